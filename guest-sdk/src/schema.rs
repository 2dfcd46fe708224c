//! What the values of a state look like, found out by asking serde, and how values that were written
//! with another schema are read.
//!
//! A schema is a line of text that people can read: `struct Stats{count:u64,mean:f64}`, `[u8]` for a
//! sequence, `?u32` for an option, `{string:u64}` for a map, `(u8,u8)` for a tuple, `enum E{A,B(u8)}`.
//! A type of which serde does not tell enough is named and no more: `opaque alloc::..`.

use std::{cell::RefCell, collections::BTreeMap, fmt};

use serde::{
    Deserializer,
    de::{
        self, DeserializeOwned, DeserializeSeed, EnumAccess, MapAccess, SeqAccess, VariantAccess,
        Visitor,
    },
};
use serde_json::Value;

/// Deeper types are cut off: they contain themselves.
const DEPTH_MAX: usize = 24;
/// Variants of all enums in a type.
const PASSES_MAX: usize = 1_000;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Schema {
    Scalar(&'static str),
    Option(Box<Schema>),
    Seq(Box<Schema>),
    Map(Box<Schema>, Box<Schema>),
    Tuple(Vec<Schema>),
    Struct(String, Vec<(String, Schema)>),
    Enum(String, Vec<(String, Schema)>),
    Opaque(String),
}

const UNIT: Schema = Schema::Scalar("unit");

const SCALARS: [&str; 16] = [
    "bool", "i8", "i16", "i32", "i64", "i128", "u8", "u16", "u32", "u64", "u128", "f32", "f64",
    "char", "string", "bytes",
];

impl fmt::Display for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, items: &[(String, Schema)], between: &str| {
            for (place, (name, schema)) in items.iter().enumerate() {
                let comma = if place == 0 { "" } else { "," };
                match (schema, between) {
                    (Schema::Scalar("unit"), "") => write!(f, "{comma}{name}")?,
                    (Schema::Tuple(_), "") => write!(f, "{comma}{name}{schema}")?,
                    (Schema::Struct(_, fields), "") => {
                        write!(
                            f,
                            "{comma}{name}{}",
                            Schema::Struct(String::new(), fields.clone())
                        )?;
                    }
                    (schema, "") => write!(f, "{comma}{name}({schema})")?,
                    (schema, between) => write!(f, "{comma}{name}{between}{schema}")?,
                }
            }
            Ok(())
        };
        match self {
            Self::Scalar(name) => f.write_str(name),
            Self::Option(inner) => write!(f, "?{inner}"),
            Self::Seq(inner) => write!(f, "[{inner}]"),
            Self::Map(key, value) => write!(f, "{{{key}:{value}}}"),
            Self::Tuple(items) => {
                f.write_str("(")?;
                for (place, item) in items.iter().enumerate() {
                    write!(f, "{}{item}", if place == 0 { "" } else { "," })?;
                }
                f.write_str(")")
            }
            Self::Struct(name, fields) => {
                if !name.is_empty() {
                    write!(f, "struct {name}")?;
                }
                f.write_str("{")?;
                list(f, fields, ":")?;
                f.write_str("}")
            }
            Self::Enum(name, variants) => {
                write!(f, "enum {name}{{")?;
                list(f, variants, "")?;
                f.write_str("}")
            }
            Self::Opaque(name) => write!(f, "opaque {name}"),
        }
    }
}

/// The schema of a type.
pub(crate) fn schema_of<V: DeserializeOwned>() -> Schema {
    let trace = Trace::default();
    for _ in 0..PASSES_MAX {
        trace.has_more.replace(false);
        let mut found = UNIT;
        let tracer = Tracer { trace: &trace, out: &mut found, depth: 0 };
        if V::deserialize(tracer).is_err() {
            return Schema::Opaque(std::any::type_name::<V>().to_owned());
        }
        if !trace.has_more.take() {
            return trace.completed(&found);
        }
    }
    Schema::Opaque(std::any::type_name::<V>().to_owned())
}

/// The variants of an enum, each with what it holds, once it was visited.
type Variants = Vec<(String, Option<Schema>)>;

/// What is known of the enums of a type: one variant of each is visited in a pass.
#[derive(Default)]
struct Trace {
    /// By [`enum_id`].
    enums: RefCell<BTreeMap<String, Variants>>,
    has_more: RefCell<bool>,
}

impl Trace {
    /// Puts all variants of each enum in its place.
    fn completed(&self, schema: &Schema) -> Schema {
        self.completed_within(schema, &mut Vec::new())
    }

    fn completed_within(&self, schema: &Schema, outer: &mut Vec<String>) -> Schema {
        let mut inner = |schema: &Schema| self.completed_within(schema, outer);
        match schema {
            Schema::Option(it) => Schema::Option(Box::new(inner(it))),
            Schema::Seq(it) => Schema::Seq(Box::new(inner(it))),
            Schema::Map(key, value) => Schema::Map(Box::new(inner(key)), Box::new(inner(value))),
            Schema::Tuple(items) => Schema::Tuple(items.iter().map(inner).collect()),
            Schema::Struct(name, fields) => {
                let field = |(name, it): &(String, Schema)| (name.clone(), inner(it));
                Schema::Struct(name.clone(), fields.iter().map(field).collect())
            }
            Schema::Enum(id, _) if outer.contains(id) => Schema::Enum(enum_name(id), Vec::new()),
            Schema::Enum(id, _) => {
                outer.push(id.clone());
                let known = self.enums.borrow().get(id).cloned().unwrap_or_default();
                let variants = known.into_iter().map(|(variant, schema)| {
                    (variant, self.completed_within(&schema.unwrap_or(UNIT), outer))
                });
                let variants = variants.collect();
                outer.pop();
                Schema::Enum(enum_name(id), variants)
            }
            other => other.clone(),
        }
    }
}

/// What tells an enum from others of its name: `Slot<u8>` and `Slot<u64>` are both `Slot` to serde, and
/// have visitors of their own.
fn enum_id<V>(name: &str) -> String {
    format!("{name}\0{}", std::any::type_name::<V>())
}

fn enum_name(id: &str) -> String {
    id.split('\0').next().unwrap_or_default().to_owned()
}

/// Answers every question of a type with a value of the kind that it asks for, and notes the kind.
struct Tracer<'t> {
    trace: &'t Trace,
    out: &'t mut Schema,
    depth: usize,
}

#[derive(Debug)]
pub(crate) struct Failed(String);

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failed {}

impl de::Error for Failed {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

macro_rules! scalars {
    ($($method:ident, $visit:ident, $name:literal, $value:expr;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
            *self.out = Schema::Scalar($name);
            visitor.$visit($value)
        })*
    };
}

impl<'t> Tracer<'t> {
    fn within<'s>(trace: &'s Trace, depth: usize, out: &'s mut Schema) -> Tracer<'s> {
        Tracer { trace, out, depth: depth + 1 }
    }
}

impl<'de> Deserializer<'de> for Tracer<'_> {
    type Error = Failed;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Failed> {
        Err(Failed("it asks what it is".to_owned()))
    }

    scalars! {
        deserialize_bool, visit_bool, "bool", true;
        deserialize_i8, visit_i8, "i8", 1;
        deserialize_i16, visit_i16, "i16", 1;
        deserialize_i32, visit_i32, "i32", 1;
        deserialize_i64, visit_i64, "i64", 1;
        deserialize_i128, visit_i128, "i128", 1;
        deserialize_u8, visit_u8, "u8", 1;
        deserialize_u16, visit_u16, "u16", 1;
        deserialize_u32, visit_u32, "u32", 1;
        deserialize_u64, visit_u64, "u64", 1;
        deserialize_u128, visit_u128, "u128", 1;
        deserialize_f32, visit_f32, "f32", 1.0;
        deserialize_f64, visit_f64, "f64", 1.0;
        deserialize_char, visit_char, "char", 'a';
        deserialize_str, visit_str, "string", "";
        deserialize_string, visit_string, "string", String::new();
        deserialize_bytes, visit_bytes, "bytes", &[];
        deserialize_byte_buf, visit_byte_buf, "bytes", Vec::new();
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        if DEPTH_MAX < self.depth {
            *self.out = Schema::Option(Box::new(UNIT));
            return visitor.visit_none();
        }
        let mut inner = UNIT;
        let value = visitor.visit_some(Tracer::within(self.trace, self.depth, &mut inner))?;
        *self.out = Schema::Option(Box::new(inner));
        Ok(value)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        *self.out = UNIT;
        visitor.visit_unit()
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        self.deserialize_unit(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        let mut items = vec![UNIT];
        let count = usize::from(self.depth <= DEPTH_MAX);
        let value = visitor.visit_seq(Items {
            trace: self.trace,
            depth: self.depth,
            items: &mut items[..count],
            next: 0,
        })?;
        *self.out = Schema::Seq(Box::new(items.remove(0)));
        Ok(value)
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        let mut items = vec![UNIT; len];
        let (trace, depth) = (self.trace, self.depth);
        let value = visitor.visit_seq(Items { trace, depth, items: &mut items, next: 0 })?;
        *self.out = Schema::Tuple(items);
        Ok(value)
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, Failed> {
        self.deserialize_tuple(len, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
        let mut items = vec![UNIT; 2];
        let count = if self.depth <= DEPTH_MAX { 2 } else { 0 };
        let value = visitor.visit_map(Items {
            trace: self.trace,
            depth: self.depth,
            items: &mut items[..count],
            next: 0,
        })?;
        let (value_schema, key) = (items.remove(1), items.remove(0));
        *self.out = Schema::Map(Box::new(key), Box::new(value_schema));
        Ok(value)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failed> {
        if 2 * DEPTH_MAX < self.depth {
            return Err(Failed("it contains itself".to_owned()));
        }
        let mut items = vec![UNIT; fields.len()];
        let (trace, depth) = (self.trace, self.depth);
        let value = visitor.visit_seq(Items { trace, depth, items: &mut items, next: 0 })?;
        let fields = fields.iter().map(|field| (*field).to_owned()).zip(items).collect();
        *self.out = Schema::Struct(name.to_owned(), fields);
        Ok(value)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failed> {
        if variants.is_empty() {
            return Err(Failed("an enum without variants".to_owned()));
        }
        let id = enum_id::<V>(name);
        let chosen = {
            let mut enums = self.trace.enums.borrow_mut();
            let unknown = || variants.iter().map(|it| ((*it).to_owned(), None)).collect();
            let known = enums.entry(id.clone()).or_insert_with(unknown);
            let open = known.iter().position(|(_, schema)| schema.is_none());
            // Within itself, the first one: it is most often the one that ends.
            let chosen = open.filter(|_| self.depth <= DEPTH_MAX).unwrap_or(0);
            if let Some((_, schema @ None)) = known.get_mut(chosen) {
                *schema = Some(UNIT);
            }
            if known.iter().any(|(_, schema)| schema.is_none()) {
                self.trace.has_more.replace(true);
            }
            chosen
        };
        if 2 * DEPTH_MAX < self.depth {
            return Err(Failed("it contains itself".to_owned()));
        }
        let mut content = UNIT;
        let access = Variant {
            index: chosen as u32,
            tracer: Tracer::within(self.trace, self.depth, &mut content),
        };
        let value = visitor.visit_enum(access)?;
        if content != UNIT
            && let Some(known) = self.trace.enums.borrow_mut().get_mut(&id)
            && let Some((_, schema)) = known.get_mut(chosen)
        {
            *schema = Some(content);
        }
        *self.out = Schema::Enum(id, Vec::new());
        Ok(value)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Failed> {
        Err(Failed("it asks for a name".to_owned()))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Failed> {
        Err(Failed("it skips something".to_owned()))
    }

    fn is_human_readable(&self) -> bool {
        false
    }
}

/// The elements of a sequence, a tuple, a struct or a map, one after the other.
struct Items<'t> {
    trace: &'t Trace,
    depth: usize,
    items: &'t mut [Schema],
    next: usize,
}

impl Items<'_> {
    fn next<'de, T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Failed> {
        let Some(item) = self.items.get_mut(self.next) else { return Ok(None) };
        self.next += 1;
        seed.deserialize(Tracer::within(self.trace, self.depth, item)).map(Some)
    }
}

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = Failed;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Failed> {
        self.next(seed)
    }
}

impl<'de> MapAccess<'de> for Items<'_> {
    type Error = Failed;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Failed> {
        self.next(seed)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Failed> {
        self.next(seed)?.ok_or_else(|| Failed("a key without a value".to_owned()))
    }
}

struct Variant<'t> {
    index: u32,
    tracer: Tracer<'t>,
}

impl<'de, 't> EnumAccess<'de> for Variant<'t> {
    type Error = Failed;
    type Variant = Tracer<'t>;

    fn variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<(T::Value, Tracer<'t>), Failed> {
        let index: de::value::U32Deserializer<Failed> =
            de::IntoDeserializer::into_deserializer(self.index);
        Ok((seed.deserialize(index)?, self.tracer))
    }
}

impl<'de> VariantAccess<'de> for Tracer<'_> {
    type Error = Failed;

    fn unit_variant(self) -> Result<(), Failed> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Failed> {
        seed.deserialize(self)
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Failed> {
        self.deserialize_tuple(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failed> {
        self.deserialize_struct("", fields, visitor)
    }
}

impl Schema {
    /// Reads the text of a schema.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut rest = text;
        let schema = parse(&mut rest).map_err(|what| format!("\"{text}\" is no schema: {what}"))?;
        match rest {
            "" => Ok(schema),
            rest => Err(format!("\"{text}\" is no schema: \"{rest}\" follows it")),
        }
    }

    /// A value of it, as it would be written: what every number of it is 1, and every text empty.
    fn sample(&self, pass: usize, out: &mut Vec<u8>) -> Result<(), String> {
        match self {
            Self::Scalar(name) => match *name {
                "unit" => {}
                "f32" => out.extend(1f32.to_le_bytes()),
                "f64" => out.extend(1f64.to_le_bytes()),
                "string" | "bytes" => out.push(0),
                "char" => out.extend([1, b'a']),
                // Zigzag of 1 is 2.
                name if name.starts_with('i') && name != "i8" => out.push(2),
                _ => out.push(1),
            },
            Self::Option(inner) => {
                out.push(1);
                inner.sample(pass, out)?;
            }
            Self::Seq(inner) => {
                out.push(1);
                inner.sample(pass, out)?;
            }
            Self::Map(key, value) => {
                out.push(1);
                key.sample(pass, out)?;
                value.sample(pass, out)?;
            }
            Self::Tuple(items) => items.iter().try_for_each(|item| item.sample(pass, out))?,
            Self::Struct(_, fields) => {
                fields.iter().try_for_each(|(_, it)| it.sample(pass, out))?
            }
            Self::Enum(name, variants) => {
                let index = pass.min(variants.len().saturating_sub(1));
                let (_, content) = variants
                    .get(index)
                    .ok_or_else(|| format!("enum {name} contains itself, and is not converted"))?;
                out.extend(postcard::to_allocvec(&(index as u32)).map_err(|it| it.to_string())?);
                content.sample(pass, out)?;
            }
            Self::Opaque(name) => return Err(format!("nobody knows what {name} looks like")),
        }
        Ok(())
    }

    /// A value that was written with this schema.
    fn read(&self, bytes: &mut &[u8]) -> Result<Value, String> {
        fn take<T: DeserializeOwned>(bytes: &mut &[u8]) -> Result<T, String> {
            let (value, rest) = postcard::take_from_bytes(bytes).map_err(|it| it.to_string())?;
            *bytes = rest;
            Ok(value)
        }
        let float = |value: f64| {
            let number = serde_json::Number::from_f64(value);
            number.map(Value::Number).ok_or_else(|| format!("{value} cannot be converted"))
        };
        Ok(match self {
            Self::Scalar(name) => match *name {
                "unit" => Value::Null,
                "bool" => take::<bool>(bytes)?.into(),
                "i8" => take::<i8>(bytes)?.into(),
                "i16" => take::<i16>(bytes)?.into(),
                "i32" => take::<i32>(bytes)?.into(),
                "i64" => take::<i64>(bytes)?.into(),
                "u8" => take::<u8>(bytes)?.into(),
                "u16" => take::<u16>(bytes)?.into(),
                "u32" => take::<u32>(bytes)?.into(),
                "u64" => take::<u64>(bytes)?.into(),
                "f32" => float(take::<f32>(bytes)?.into())?,
                "f64" => float(take::<f64>(bytes)?)?,
                "char" => take::<char>(bytes)?.to_string().into(),
                "string" => take::<String>(bytes)?.into(),
                "bytes" => take::<Vec<u8>>(bytes)?.into(),
                other => return Err(format!("{other} cannot be converted")),
            },
            Self::Option(inner) if matches!(**inner, Self::Option(_) | UNIT) => {
                return Err(
                    "an option of something that may be nothing is not converted".to_owned()
                );
            }
            Self::Option(inner) => match take::<u8>(bytes)? {
                0 => Value::Null,
                _ => inner.read(bytes)?,
            },
            Self::Seq(inner) => {
                let len = take::<u64>(bytes)?;
                let items = (0..len).map(|_| inner.read(bytes));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            Self::Map(key, value) => {
                let len = take::<u64>(bytes)?;
                let mut map = serde_json::Map::new();
                for _ in 0..len {
                    let key = match key.read(bytes)? {
                        Value::String(key) => key,
                        Value::Number(key) => key.to_string(),
                        other => return Err(format!("a key {other} cannot be converted")),
                    };
                    map.insert(key, value.read(bytes)?);
                }
                Value::Object(map)
            }
            Self::Tuple(items) => {
                let items = items.iter().map(|item| item.read(bytes));
                Value::Array(items.collect::<Result<_, _>>()?)
            }
            Self::Struct(_, fields) => {
                let fields = fields.iter().map(|(name, it)| Ok((name.clone(), it.read(bytes)?)));
                Value::Object(fields.collect::<Result<_, String>>()?)
            }
            Self::Enum(name, variants) => {
                let index = take::<u32>(bytes)?;
                let Some((variant, content)) = variants.get(index as usize) else {
                    return Err(format!("enum {name} has no variant {index}"));
                };
                match content {
                    Self::Scalar("unit") => variant.clone().into(),
                    content => Value::Object(
                        [(variant.clone(), content.read(bytes)?)].into_iter().collect(),
                    ),
                }
            }
            Self::Opaque(name) => return Err(format!("nobody knows what {name} looks like")),
        })
    }

    /// Reads a value that was written with this schema as one of another type: fields are matched by
    /// name, those that are new take the default that serde has for them, integers may be wider.
    pub(crate) fn convert<V: DeserializeOwned>(&self, bytes: &[u8]) -> Result<V, String> {
        let mut rest = bytes;
        let value = self.read(&mut rest)?;
        if !rest.is_empty() {
            return Err("something follows the value".to_owned());
        }
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    /// Whether values of this schema can become values of a type: each of its variants is tried.
    pub(crate) fn converts_to<V: DeserializeOwned>(&self, target: &Schema) -> Result<(), String> {
        self.fits(target)?;
        for pass in 0..self.variants_max().max(1) {
            let mut bytes = Vec::new();
            self.sample(pass, &mut bytes)?;
            self.convert::<V>(&bytes)?;
        }
        Ok(())
    }

    /// How many variants the largest of its enums has.
    fn variants_max(&self) -> usize {
        match self {
            Self::Enum(_, variants) => {
                let inner = variants.iter().map(|(_, it)| it.variants_max()).max();
                variants.len().max(inner.unwrap_or(0))
            }
            Self::Option(it) | Self::Seq(it) => it.variants_max(),
            Self::Map(key, value) => key.variants_max().max(value.variants_max()),
            Self::Tuple(items) => items.iter().map(Self::variants_max).max().unwrap_or(0),
            Self::Struct(_, fields) => {
                fields.iter().map(|(_, it)| it.variants_max()).max().unwrap_or(0)
            }
            Self::Scalar(_) | Self::Opaque(_) => 0,
        }
    }

    /// Whether nothing is lost or reinterpreted on the way to another schema.
    fn fits(&self, target: &Self) -> Result<(), String> {
        let no = || Err(format!("{self} does not become {target}"));
        match (self, target) {
            (Self::Scalar(from), Self::Scalar(to)) if is_widened(from, to) => Ok(()),
            (from, Self::Option(to)) if !matches!(from, Self::Option(_)) => from.fits(to),
            (Self::Option(from), Self::Option(to)) | (Self::Seq(from), Self::Seq(to)) => {
                from.fits(to)
            }
            (Self::Map(key, value), Self::Map(to_key, to_value)) => {
                key.fits(to_key).and_then(|()| value.fits(to_value))
            }
            (Self::Tuple(from), Self::Tuple(to)) if from.len() == to.len() => {
                from.iter().zip(to).try_for_each(|(from, to)| from.fits(to))
            }
            (Self::Struct(_, from), Self::Struct(_, to)) => {
                for (name, from) in from {
                    match to.iter().find(|(other, _)| other == name) {
                        Some((_, to)) => {
                            from.fits(to).map_err(|what| format!("field `{name}`: {what}"))?;
                        }
                        None => return Err(format!("field `{name}` would be lost")),
                    }
                }
                Ok(())
            }
            (Self::Enum(_, from), Self::Enum(_, to)) => {
                for (name, from) in from {
                    match to.iter().find(|(other, _)| other == name) {
                        Some((_, to)) => {
                            from.fits(to).map_err(|what| format!("variant `{name}`: {what}"))?;
                        }
                        None => return Err(format!("variant `{name}` is not there any more")),
                    }
                }
                Ok(())
            }
            _ => no(),
        }
    }
}

/// Whether every value of one kind is a value of the other.
fn is_widened(from: &str, to: &str) -> bool {
    let bits = |name: &str| name.get(1..).and_then(|bits| bits.parse::<u32>().ok());
    let (Some(from_kind), Some(to_kind)) = (from.get(..1), to.get(..1)) else { return false };
    match (from_kind, to_kind, bits(from), bits(to)) {
        _ if from == to => true,
        ("u", "u", Some(from), Some(to)) | ("i", "i", Some(from), Some(to)) => {
            from < to && to <= 64
        }
        ("u", "i", Some(from), Some(to)) => from < to && to <= 64,
        ("f", "f", Some(32), Some(64)) => true,
        _ => false,
    }
}

fn parse(rest: &mut &str) -> Result<Schema, String> {
    if let Some(inner) = rest.strip_prefix('?') {
        *rest = inner;
        return Ok(Schema::Option(Box::new(parse(rest)?)));
    }
    if eat(rest, "[") {
        let inner = parse(rest)?;
        expect(rest, "]")?;
        return Ok(Schema::Seq(Box::new(inner)));
    }
    if eat(rest, "(") {
        return Ok(Schema::Tuple(tuple(rest)?));
    }
    if eat(rest, "{") {
        let key = parse(rest)?;
        expect(rest, ":")?;
        let value = parse(rest)?;
        expect(rest, "}")?;
        return Ok(Schema::Map(Box::new(key), Box::new(value)));
    }
    if eat(rest, "struct ") {
        let name = word(rest);
        expect(rest, "{")?;
        return Ok(Schema::Struct(name, fields(rest)?));
    }
    if eat(rest, "enum ") {
        let name = word(rest);
        expect(rest, "{")?;
        let mut variants = Vec::new();
        while !eat(rest, "}") {
            let variant = word(rest);
            if variant.is_empty() {
                return Err("a variant has no name".to_owned());
            }
            let content = if eat(rest, "(") {
                let mut items = tuple(rest)?;
                if items.len() == 1 { items.remove(0) } else { Schema::Tuple(items) }
            } else if eat(rest, "{") {
                Schema::Struct(String::new(), fields(rest)?)
            } else {
                UNIT
            };
            variants.push((variant, content));
            eat(rest, ",");
        }
        return Ok(Schema::Enum(name, variants));
    }
    if let Some(name) = rest.strip_prefix("opaque ") {
        let name = name.to_owned();
        *rest = "";
        return Ok(Schema::Opaque(name));
    }
    let name = word(rest);
    if name == "unit" {
        return Ok(UNIT);
    }
    let known = SCALARS.iter().find(|known| **known == name);
    known.map(|name| Schema::Scalar(name)).ok_or_else(|| format!("\"{name}\" is not known"))
}

fn tuple(rest: &mut &str) -> Result<Vec<Schema>, String> {
    let mut items = Vec::new();
    while !eat(rest, ")") {
        items.push(parse(rest)?);
        eat(rest, ",");
    }
    Ok(items)
}

fn fields(rest: &mut &str) -> Result<Vec<(String, Schema)>, String> {
    let mut fields = Vec::new();
    while !eat(rest, "}") {
        let name = word(rest);
        expect(rest, ":")?;
        fields.push((name, parse(rest)?));
        eat(rest, ",");
    }
    Ok(fields)
}

fn word(rest: &mut &str) -> String {
    let end = rest.find([',', ':', '{', '}', '(', ')', '[', ']']).unwrap_or(rest.len());
    let (word, behind) = rest.split_at(end);
    *rest = behind;
    word.to_owned()
}

fn eat(rest: &mut &str, what: &str) -> bool {
    match rest.strip_prefix(what) {
        Some(behind) => {
            *rest = behind;
            true
        }
        None => false,
    }
}

fn expect(rest: &mut &str, what: &str) -> Result<(), String> {
    match eat(rest, what) {
        true => Ok(()),
        false => Err(format!("\"{what}\" is missing before \"{rest}\"")),
    }
}

#[cfg(test)]
mod tests {
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
}
