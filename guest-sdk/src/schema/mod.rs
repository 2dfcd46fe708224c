//! What the values of a state look like, found out by asking serde, and how values that were written
//! with another schema are read.
//!
//! A schema is a line of text that people can read: `struct Stats{count:u64,mean:f64}`, `[u8]` for a
//! sequence, `?u32` for an option, `{string:u64}` for a map, `(u8,u8)` for a tuple, `enum E{A,B(u8)}`.
//! A type of which serde does not tell enough is named and no more: `opaque alloc::..`.

#[cfg(test)]
mod tests;
mod text;
mod trace;

use std::fmt;

use serde::de::DeserializeOwned;
use serde_json::Value;

use self::text::parse;

pub(crate) use self::trace::schema_of;

/// Deeper types are cut off: they contain themselves.
const DEPTH_MAX: usize = 24;

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
        Ok(match self {
            Self::Scalar(name) => read_scalar(name, bytes)?,
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

/// Reads a value from the beginning of the bytes.
fn take<T: DeserializeOwned>(bytes: &mut &[u8]) -> Result<T, String> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|it| it.to_string())?;
    *bytes = rest;
    Ok(value)
}

/// Reads a value of a type that consists of nothing else.
fn read_scalar(name: &str, bytes: &mut &[u8]) -> Result<Value, String> {
    let float = |value: f64| {
        let number = serde_json::Number::from_f64(value);
        number.map(Value::Number).ok_or_else(|| format!("{value} cannot be converted"))
    };
    Ok(match name {
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
    })
}
