//! Values of declared state as JSON, by the schema that their operator has described: for people and
//! programs that look at state from outside.
//!
//! A schema is text such as `struct Stats{count:u64,last:?i64}`; `guest-sdk/src/schema/` makes it, and says
//! what each form means. Values are in the postcard encoding. Both come from a guest, so nothing here
//! trusts either: every length is bounded by the bytes that are there, and every depth by [`DEPTH_MAX`].

use serde_json::{Map, Number, Value};

/// Deeper values are refused: they would take the stack.
const DEPTH_MAX: usize = 128;
/// And those of more parts: what has no bytes of its own can be without end.
const PARTS_MAX: usize = 4 << 20;

type Result<T> = std::result::Result<T, String>;

/// The value as JSON. An integer of more than 64 bits, and a number that JSON does not have, are text.
///
/// # Errors
/// Where the schema says that nobody knows what the value looks like, or the bytes are not of it.
pub fn to_json(schema: &str, bytes: &[u8]) -> Result<Value> {
    let mut nesting = 0;
    for byte in schema.bytes() {
        match byte {
            b'[' | b'(' | b'{' => nesting += 1,
            b']' | b')' | b'}' => nesting -= 1,
            _ => {}
        }
        if DEPTH_MAX as i64 <= nesting {
            return Err("its schema is too deep".to_owned());
        }
    }
    let mut reader = Reader { bytes, outer: Vec::new(), depth: 0, parts: 0 };
    let mut rest = schema;
    let value = reader.value(&mut rest)?;
    match (rest, reader.bytes) {
        ("", []) => Ok(value),
        ("", _) => Err("something follows the value".to_owned()),
        (rest, _) => Err(format!("\"{rest}\" follows the schema")),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    /// The enums around a value, by name, each with the text of its variants: one that contains itself
    /// is named inside without them.
    outer: Vec<(&'a str, &'a str)>,
    depth: usize,
    parts: usize,
}

impl<'a> Reader<'a> {
    /// Reads a value of the schema that the text begins with, and goes behind both.
    fn value(&mut self, schema: &mut &'a str) -> Result<Value> {
        (self.depth, self.parts) = (self.depth + 1, self.parts + 1);
        if PARTS_MAX < self.parts {
            return Err("it has too many parts".to_owned());
        }
        if DEPTH_MAX < self.depth {
            return Err("it is too deep".to_owned());
        }
        let value = self.value_within(schema);
        self.depth -= 1;
        value
    }

    fn value_within(&mut self, schema: &mut &'a str) -> Result<Value> {
        if eat(schema, "?") {
            return match self.byte()? {
                0 => skip(schema).map(|()| Value::Null),
                1 => self.value(schema),
                other => Err(format!("an option begins with {other}")),
            };
        }
        if eat(schema, "[") {
            let item = *schema;
            let items = self.count()?;
            let values = (0..items).map(|_| self.value(&mut { item }));
            let values = values.collect::<Result<_>>()?;
            skip(schema)?;
            expect(schema, "]")?;
            return Ok(Value::Array(values));
        }
        if eat(schema, "(") {
            return self.tuple(schema).map(Value::Array);
        }
        if eat(schema, "{") {
            return self.map(schema);
        }
        if eat(schema, "struct ") {
            word(schema);
            expect(schema, "{")?;
            return self.fields(schema);
        }
        if eat(schema, "enum ") {
            return self.variant(schema);
        }
        if let Some(name) = schema.strip_prefix("opaque ") {
            return Err(format!("nobody knows what {name} looks like"));
        }
        self.scalar(word(schema))
    }

    fn tuple(&mut self, schema: &mut &'a str) -> Result<Vec<Value>> {
        let mut items = Vec::new();
        while !eat(schema, ")") {
            items.push(self.value(schema)?);
            eat(schema, ",");
        }
        Ok(items)
    }

    fn fields(&mut self, schema: &mut &'a str) -> Result<Value> {
        let mut fields = Map::new();
        while !eat(schema, "}") {
            let name = word(schema).to_owned();
            expect(schema, ":")?;
            fields.insert(name, self.value(schema)?);
            eat(schema, ",");
        }
        Ok(Value::Object(fields))
    }

    /// A map whose keys are text or numbers is an object, another one a list of pairs.
    fn map(&mut self, schema: &mut &'a str) -> Result<Value> {
        let entry = *schema;
        let mut pairs = Vec::new();
        for _ in 0..self.count()? {
            let mut rest = entry;
            let key = self.value(&mut rest)?;
            expect(&mut rest, ":")?;
            pairs.push((key, self.value(&mut rest)?));
        }
        skip(schema)?;
        expect(schema, ":")?;
        skip(schema)?;
        expect(schema, "}")?;
        let is_plain = |(key, _): &(Value, Value)| key.is_string() || key.is_number();
        if !pairs.iter().all(is_plain) {
            let pair = |(key, value)| Value::Array(vec![key, value]);
            return Ok(Value::Array(pairs.into_iter().map(pair).collect()));
        }
        let plain = |(key, value): (Value, Value)| match key {
            Value::String(key) => (key, value),
            key => (key.to_string(), value),
        };
        Ok(Value::Object(pairs.into_iter().map(plain).collect()))
    }

    fn variant(&mut self, schema: &mut &'a str) -> Result<Value> {
        let name = word(schema);
        expect(schema, "{")?;
        let variants = match *schema {
            rest if rest.starts_with('}') => {
                let known = self.outer.iter().rev().find(|(outer, _)| *outer == name);
                known.ok_or_else(|| format!("enum {name} has no variants"))?.1
            }
            rest => rest,
        };
        let chosen = u32::try_from(self.unsigned()?).map_err(|_| "a variant of 2^32".to_owned())?;
        self.outer.push((name, variants));
        let value = self.variant_of(chosen, variants);
        self.outer.pop();
        let value = value?;
        while !eat(schema, "}") {
            skip_variant(schema)?;
        }
        Ok(value)
    }

    fn variant_of(&mut self, chosen: u32, mut variants: &'a str) -> Result<Value> {
        for _ in 0..chosen {
            if variants.starts_with('}') {
                break;
            }
            skip_variant(&mut variants)?;
        }
        let name = word(&mut variants).to_owned();
        if name.is_empty() {
            return Err(format!("there is no variant {chosen}"));
        }
        let content = if eat(&mut variants, "(") {
            let mut items = self.tuple(&mut variants)?;
            if items.len() == 1 { items.remove(0) } else { Value::Array(items) }
        } else if eat(&mut variants, "{") {
            self.fields(&mut variants)?
        } else {
            return Ok(Value::String(name));
        };
        Ok(Value::Object([(name, content)].into_iter().collect()))
    }

    fn scalar(&mut self, name: &str) -> Result<Value> {
        let float = |value: f64| {
            Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number)
        };
        Ok(match name {
            "unit" => Value::Null,
            "bool" => match self.byte()? {
                0 => false.into(),
                1 => true.into(),
                other => return Err(format!("{other} is no bool")),
            },
            "u8" => self.byte()?.into(),
            "i8" => self.byte()?.cast_signed().into(),
            "u16" | "u32" | "u64" | "u128" => integer(self.unsigned()?),
            "i16" | "i32" | "i64" | "i128" => {
                let zigzag = self.unsigned()?;
                signed((zigzag >> 1).cast_signed() ^ -((zigzag & 1).cast_signed()))
            }
            "f32" => float(f32::from_le_bytes(self.array()?).into()),
            "f64" => float(f64::from_le_bytes(self.array()?)),
            "char" | "string" => {
                let bytes = self.counted()?;
                let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
                text.into()
            }
            "bytes" => self.counted()?.into(),
            other => return Err(format!("\"{other}\" is not known")),
        })
    }

    fn byte(&mut self) -> Result<u8> {
        self.array().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.bytes.split_first_chunk().ok_or("the value is cut short")?;
        self.bytes = rest;
        Ok(*array)
    }

    /// Seven bits a byte, the least first.
    fn unsigned(&mut self) -> Result<u128> {
        let mut number = 0;
        for shift in (0..128).step_by(7) {
            let byte = self.byte()?;
            number |= u128::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err("a number of more than 128 bits".to_owned())
    }

    /// How many items follow. Each takes a byte at least, but for those that have none.
    fn count(&mut self) -> Result<usize> {
        let count = usize::try_from(self.unsigned()?).map_err(|error| error.to_string())?;
        match count <= self.bytes.len() {
            true => Ok(count),
            false => Err(format!("{count} items in {} bytes", self.bytes.len())),
        }
    }

    fn counted(&mut self) -> Result<&'a [u8]> {
        let count = self.count()?;
        let (bytes, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        Ok(bytes)
    }
}

fn integer(number: u128) -> Value {
    u64::try_from(number).map_or_else(|_| Value::String(number.to_string()), Value::from)
}

fn signed(number: i128) -> Value {
    i64::try_from(number).map_or_else(|_| Value::String(number.to_string()), Value::from)
}

/// Goes behind the schema that the text begins with.
fn skip(schema: &mut &str) -> Result<()> {
    while eat(schema, "?") {}
    if eat(schema, "[") {
        skip(schema)?;
        return expect(schema, "]");
    }
    if eat(schema, "(") {
        return skip_list(schema, ")", skip);
    }
    if eat(schema, "{") {
        skip(schema)?;
        expect(schema, ":")?;
        skip(schema)?;
        return expect(schema, "}");
    }
    if eat(schema, "struct ") {
        word(schema);
        expect(schema, "{")?;
        return skip_list(schema, "}", skip_field);
    }
    if eat(schema, "enum ") {
        word(schema);
        expect(schema, "{")?;
        return skip_list(schema, "}", skip_variant);
    }
    if schema.starts_with("opaque ") {
        *schema = "";
        return Ok(());
    }
    match word(schema) {
        "" => Err(format!("no schema before \"{schema}\"")),
        _ => Ok(()),
    }
}

fn skip_list(schema: &mut &str, end: &str, one: fn(&mut &str) -> Result<()>) -> Result<()> {
    while !eat(schema, end) {
        one(schema)?;
        eat(schema, ",");
    }
    Ok(())
}

fn skip_field(schema: &mut &str) -> Result<()> {
    word(schema);
    expect(schema, ":")?;
    skip(schema)
}

fn skip_variant(schema: &mut &str) -> Result<()> {
    if word(schema).is_empty() {
        return Err(format!("no variant before \"{schema}\""));
    }
    if eat(schema, "(") {
        skip_list(schema, ")", skip)?;
    } else if eat(schema, "{") {
        skip_list(schema, "}", skip_field)?;
    }
    eat(schema, ",");
    Ok(())
}

fn word<'a>(schema: &mut &'a str) -> &'a str {
    let end = schema.find([',', ':', '{', '}', '(', ')', '[', ']']).unwrap_or(schema.len());
    let (word, rest) = schema.split_at(end);
    *schema = rest;
    word
}

fn eat(schema: &mut &str, what: &str) -> bool {
    match schema.strip_prefix(what) {
        Some(rest) => {
            *schema = rest;
            true
        }
        None => false,
    }
}

fn expect(schema: &mut &str, what: &str) -> Result<()> {
    match eat(schema, what) {
        true => Ok(()),
        false => Err(format!("\"{what}\" is missing before \"{schema}\"")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde::Serialize;
    use serde_json::json;

    use super::*;

    #[derive(Serialize)]
    enum Shape {
        Empty,
        Circle(f32),
        Both(u8, i8),
        Square { side: u64 },
        Nested(Option<Box<Shape>>),
    }

    const SHAPE: &str =
        "enum Shape{Empty,Circle(f32),Both(u8,i8),Square{side:u64},Nested(?enum Shape{})}";

    #[derive(Serialize)]
    struct Stats {
        count: u32,
        last: Option<(i64, char)>,
        names: Vec<String>,
        by_key: BTreeMap<i16, bool>,
        shapes: Vec<Shape>,
        huge: u128,
        ratio: f64,
    }

    #[test]
    fn values_are_shown_as_their_schema_says() {
        let by_key = BTreeMap::from([(-3, true), (4, false)]);
        let shapes = vec![
            Shape::Empty,
            Shape::Circle(0.5),
            Shape::Both(7, -7),
            Shape::Square { side: u64::MAX },
            Shape::Nested(Some(Box::new(Shape::Nested(None)))),
        ];
        let names = vec!["a".to_owned(), "ü".to_owned()];
        let stats = Stats {
            count: 300,
            last: Some((-70_000, 'x')),
            names,
            by_key,
            shapes,
            huge: u128::MAX,
            ratio: f64::NAN,
        };
        let schema = format!(
            "struct Stats{{count:u32,last:?(i64,char),names:[string],by_key:{{i16:bool}},shapes:[{SHAPE}],\
             huge:u128,ratio:f64}}"
        );
        let bytes = postcard::to_stdvec(&stats).expect("encodes");
        let shown = to_json(&schema, &bytes).expect("shown");
        assert_eq!(
            shown,
            json!({
                "count": 300,
                "last": [-70_000, "x"],
                "names": ["a", "ü"],
                "by_key": { "-3": true, "4": false },
                "shapes": [
                    "Empty",
                    { "Circle": 0.5 },
                    { "Both": [7, -7] },
                    { "Square": { "side": u64::MAX } },
                    { "Nested": { "Nested": null } },
                ],
                "huge": u128::MAX.to_string(),
                "ratio": "NaN",
            })
        );
    }

    #[test]
    fn maps_without_plain_keys_are_lists_of_pairs() {
        let map = BTreeMap::from([((1u8, 2u8), "x")]);
        let bytes = postcard::to_stdvec(&map).expect("encodes");
        assert_eq!(to_json("{(u8,u8):string}", &bytes), Ok(json!([[[1, 2], "x"]])));
        assert_eq!(to_json("{(u8,u8):string}", &[0]), Ok(json!({})));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(to_json("opaque some::Type", &[1]).is_err());
        assert!(to_json("u8", &[1, 2]).is_err(), "something follows");
        assert!(to_json("[u64]", &[200, 1]).is_err(), "200 items in no bytes");
        assert!(to_json("[unit]", &[255, 255, 255, 255, 15]).is_err(), "items without bytes");
        assert!(to_json("bool", &[2]).is_err());
        assert!(to_json("enum E{A,B}", &[2]).is_err());
        let units = format!("[({})]", "unit,".repeat(10_000));
        let many = [&[0xff, 0xff, 0x03][..], &[0; 65_535]].concat();
        assert!(to_json(&units, &many).is_err(), "too many parts");
        for deep in ["?", "[", "(", "{"] {
            assert!(to_json(&deep.repeat(100_000), &[1; 100_000]).is_err(), "too deep");
            let behind = format!("[{}]", deep.repeat(100_000));
            assert!(to_json(&behind, &[0]).is_err(), "too deep, and skipped");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_and_no_schema_panic(schema in "[a-zA-Z0-9?\\[\\](){}:, ]{0,40}", bytes in any::<Vec<u8>>()) {
            let _ = to_json(&schema, &bytes);
            let _ = to_json(SHAPE, &bytes);
        }
    }
}
