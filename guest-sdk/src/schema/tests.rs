//! What a schema says of a type, and which conversions it allows.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stats {
    count: u32,
    mean: f64,
    names: Vec<String>,
    last: Option<(u8, i64)>,
    by_key: BTreeMap<u16, bool>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Shape {
    Empty,
    Circle(f32),
    Square { side: u64 },
    Both(u8, i8),
    Nested(Option<Box<Shape>>),
}

mod later {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    pub(super) struct Stats {
        #[serde(default)]
        pub(super) new: u8,
        pub(super) names: Vec<String>,
        pub(super) mean: f64,
        pub(super) count: u64,
        pub(super) by_key: BTreeMap<u32, bool>,
        pub(super) last: Option<(u16, i64)>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    pub(super) struct WithoutDefault {
        new: u8,
        count: u32,
        mean: f64,
        names: Vec<String>,
        last: Option<(u8, i64)>,
        by_key: BTreeMap<u16, bool>,
    }
}

fn text<V: DeserializeOwned>() -> String {
    schema_of::<V>().to_string()
}

#[test]
fn a_schema_says_what_serde_says() {
    assert_eq!(text::<u64>(), "u64");
    assert_eq!(text::<(u8, String)>(), "(u8,string)");
    assert_eq!(
        text::<Stats>(),
        "struct Stats{count:u32,mean:f64,names:[string],last:?(u8,i64),by_key:{u16:bool}}"
    );
    let shape = text::<Shape>();
    assert!(
        shape.starts_with("enum Shape{Empty,Circle(f32),Square{side:u64},Both(u8,i8),"),
        "{shape}"
    );
    assert_eq!(text::<Vec<Stats>>(), format!("[{}]", text::<Stats>()));
    assert!(text::<Value>().starts_with("opaque "), "it says nothing of itself");
}

#[test]
fn a_schema_is_read_as_it_was_written() {
    for text in [
        text::<Stats>(),
        text::<Option<Vec<(u8, char)>>>(),
        text::<BTreeMap<String, Stats>>(),
        text::<Shape>(),
        "opaque alloc::Thing<{x}>".to_owned(),
    ] {
        assert_eq!(Schema::parse(&text).expect("a schema").to_string(), text);
    }
    for wrong in ["", "u65", "[u8", "struct S{a}", "u8,", "(u8"] {
        assert!(Schema::parse(wrong).is_err(), "{wrong}");
    }
}

fn stats() -> Stats {
    Stats {
        count: 7,
        mean: -1.5,
        names: vec!["a".to_owned(), String::new()],
        last: Some((3, -9)),
        by_key: BTreeMap::from([(5, true), (600, false)]),
    }
}

#[test]
fn fields_are_matched_by_name_and_integers_may_be_wider() {
    let old = Schema::parse(&text::<Stats>()).expect("a schema");
    let new = schema_of::<later::Stats>();
    old.converts_to::<later::Stats>(&new).expect("compatible");
    let bytes = postcard::to_allocvec(&stats()).expect("encodes");
    let Stats { count, mean, names, by_key, .. } = stats();
    let by_key = by_key.into_iter().map(|(key, value)| (key.into(), value)).collect();
    assert_eq!(
        old.convert::<later::Stats>(&bytes).expect("converts"),
        later::Stats { new: 0, names, mean, count: count.into(), by_key, last: Some((3, -9)) }
    );
}

#[test]
fn what_would_be_lost_or_reinterpreted_is_refused() {
    fn refused<A: DeserializeOwned, B: DeserializeOwned>(what: &str) {
        let error = schema_of::<A>().converts_to::<B>(&schema_of::<B>()).expect_err(what);
        assert!(error.contains(what), "{error}");
    }
    refused::<u64, i64>("u64 does not become i64");
    refused::<i64, u64>("i64 does not become u64");
    refused::<u64, u32>("u64 does not become u32");
    refused::<f64, u64>("f64 does not become u64");
    refused::<Vec<u8>, String>("does not become string");
    refused::<later::Stats, Stats>("field `new` would be lost");
    refused::<Stats, later::WithoutDefault>("missing field `new`");
    refused::<(u8, u8), (u8, u8, u8)>("does not become");
    refused::<Shape, Option<u8>>("does not become u8");
    refused::<Value, u8>("does not become");
}

#[test]
fn variants_are_matched_by_name() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum More {
        New,
        Both(u16, i16),
        Square { side: u64 },
        Circle(f64),
        Empty,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Few {
        Empty,
        Circle(f32),
        Square { side: u64 },
        Both(u8, i8),
    }
    let old = schema_of::<Few>();
    old.converts_to::<More>(&schema_of::<More>()).expect("compatible");
    for (before, after) in [
        (Few::Empty, More::Empty),
        (Few::Circle(0.5), More::Circle(0.5)),
        (Few::Square { side: 4 }, More::Square { side: 4 }),
        (Few::Both(1, -2), More::Both(1, -2)),
    ] {
        let bytes = postcard::to_allocvec(&before).expect("encodes");
        assert_eq!(old.convert::<More>(&bytes).expect("converts"), after);
    }
    assert!(schema_of::<More>().converts_to::<Few>(&old).is_err());
}

#[test]
fn enums_of_one_name_are_told_apart() {
    #[derive(Debug, Serialize, Deserialize)]
    enum Slot<T> {
        Full(T),
        Empty,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Two<A, B> {
        a: Slot<A>,
        b: Slot<B>,
    }
    assert_eq!(
        text::<Two<u64, u32>>(),
        "struct Two{a:enum Slot{Full(u64),Empty},b:enum Slot{Full(u32),Empty}}"
    );
    let (before, after) = (schema_of::<Two<u64, u32>>(), schema_of::<Two<i64, u32>>());
    let error = before.converts_to::<Two<i64, u32>>(&after).expect_err("u64 as i64");
    assert!(error.contains("u64 does not become i64"), "{error}");
}

#[test]
fn what_is_said_to_convert_does() {
    #[derive(Debug, Serialize, Deserialize)]
    enum Kind {
        A,
        B { x: u8 },
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Before {
        kind: Kind,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct After {
        kind: Kind,
        more: u8,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Options {
        it: Option<Option<u8>>,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct Wider {
        it: Option<Option<u16>>,
    }
    let refused = |result: Result<(), String>, what: &str| {
        let error = result.expect_err(what);
        assert!(error.contains(what), "{error}");
    };
    let (before, after) = (schema_of::<Before>(), schema_of::<After>());
    refused(before.converts_to::<After>(&after), "missing field `more`");
    let (before, after) = (schema_of::<Options>(), schema_of::<Wider>());
    refused(before.converts_to::<Wider>(&after), "may be nothing");
    let shape = schema_of::<Shape>();
    refused(shape.converts_to::<Shape>(&shape), "contains itself");
}
