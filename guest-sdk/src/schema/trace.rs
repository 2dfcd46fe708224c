//! Finds out what a type looks like: it is deserialized from nothing, and what it asks for is noted.

use std::{cell::RefCell, collections::BTreeMap, fmt};

use serde::{
    Deserializer,
    de::{
        self, DeserializeOwned, DeserializeSeed, EnumAccess, MapAccess, SeqAccess, VariantAccess,
        Visitor,
    },
};

use super::{DEPTH_MAX, Schema, UNIT};

/// The variants of an enum, each with what it holds, once it was visited.
type Variants = Vec<(String, Option<Schema>)>;

macro_rules! scalars {
    ($($method:ident, $visit:ident, $name:literal, $value:expr;)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failed> {
            *self.out = Schema::Scalar($name);
            visitor.$visit($value)
        })*
    };
}

/// Variants of all enums in a type.
const PASSES_MAX: usize = 1_000;

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
