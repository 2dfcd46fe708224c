//! Reads the text of a schema.

use super::{SCALARS, Schema, UNIT};

pub(super) fn parse(rest: &mut &str) -> Result<Schema, String> {
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
