//! Rewrites a component so that the host can reach what no export gives: its mutable globals, and
//! the growth of its memories.
//!
//! In every core module the export section gains its mutable globals and its memories. An accessor
//! module that imports them is appended, instantiated, and its functions are lifted to exports of
//! the component: `cofferdam-get-N`, `cofferdam-set-N` for the globals, `cofferdam-grow-N` for the
//! memories, all in 64-bit numbers. No code is touched, so running costs
//! what it cost before.

#![warn(clippy::indexing_slicing, reason = "what is read is a tenant's")]

use std::ops::Range;

use wasm_encoder as enc;
use wasmparser::{
    CanonicalFunction, ComponentAlias, ComponentExternalKind, ComponentTypeRef, ExternalKind,
    Instance, MemoryType, Parser, Payload, TypeRef, ValType,
};

use crate::validate::ValidateError;

type Result<T> = std::result::Result<T, ValidateError>;

/// The version of the order in which memories and globals of a component are numbered. A snapshot holds them
/// by number, so one of another version says nothing to this one.
pub const INVENTORY: u16 = 1;

/// What an export of the accessor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Get,
    Set,
    Grow,
}

impl Access {
    /// The name of the component's export.
    pub(crate) fn name(self, index: usize) -> String {
        let verb = match self {
            Self::Get => "get",
            Self::Set => "set",
            Self::Grow => "grow",
        };
        format!("cofferdam-{verb}-{index}")
    }
}

/// State of one core module that the host wants to reach.
#[derive(Default)]
struct ModuleState {
    /// Index and type of each mutable global.
    globals: Vec<(u32, ValType)>,
    memories: Vec<(u32, MemoryType)>,
}

/// How many of everything the component has defined so far.
#[derive(Default)]
struct Counts {
    core_modules: u32,
    core_instances: u32,
    core_functions: u32,
    types: u32,
    functions: u32,
}

/// Rewrites a component that was accepted by `validate::check`.
pub(crate) fn instrument(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut out = enc::Component::new();
    let mut counts = Counts::default();
    let mut modules: Vec<ModuleState> = Vec::new();
    // Core instances in order of creation, with the module they come from.
    let mut instances: Vec<(u32, u32)> = Vec::new();
    let mut depth = 0u32;
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        match &payload {
            Payload::End(_) => {
                depth = depth.saturating_sub(1);
                continue;
            }
            _ if 0 < depth => {
                if let Payload::ModuleSection { .. } | Payload::ComponentSection { .. } = payload {
                    depth += 1;
                }
                continue;
            }
            Payload::ModuleSection { unchecked_range, .. } => {
                depth += 1;
                counts.core_modules += 1;
                let (module, state) = rewrite_module(part(bytes, unchecked_range)?)?;
                out.section(&enc::RawSection { id: 1, data: &module });
                modules.push(state);
                continue;
            }
            Payload::ComponentSection { unchecked_range, .. } => {
                depth += 1;
                out.section(&enc::RawSection { id: 4, data: part(bytes, unchecked_range)? });
                continue;
            }
            other => count(other, &mut counts, &mut instances)?,
        }
        if let Some((id, range)) = payload.as_section() {
            out.section(&enc::RawSection { id, data: part(bytes, &range)? });
        }
    }
    append_accessor(&mut out, &counts, &modules, &instances);
    Ok(out.finish())
}

/// The bytes of a section. One within another may say that it is longer than all there is: the parser takes the end
/// of the bytes for its own.
fn part<'b>(bytes: &'b [u8], range: &Range<usize>) -> Result<&'b [u8]> {
    let short = || ValidateError::Malformed(format!("it ends before byte {}", range.end));
    bytes.get(range.clone()).ok_or_else(short)
}

/// Counts what an alias makes known.
fn count_alias(alias: &ComponentAlias<'_>, counts: &mut Counts) {
    use wasmparser::ComponentOuterAliasKind as Outer;
    match alias {
        ComponentAlias::InstanceExport { kind, .. } => match kind {
            ComponentExternalKind::Module => counts.core_modules += 1,
            ComponentExternalKind::Func => counts.functions += 1,
            ComponentExternalKind::Type => counts.types += 1,
            _ => {}
        },
        ComponentAlias::CoreInstanceExport { kind, .. } => {
            if matches!(kind, ExternalKind::Func | ExternalKind::FuncExact) {
                counts.core_functions += 1;
            }
        }
        ComponentAlias::Outer { kind, .. } => match kind {
            Outer::CoreModule => counts.core_modules += 1,
            Outer::Type => counts.types += 1,
            Outer::CoreType | Outer::Component => {}
        },
    }
}

fn count(
    payload: &Payload<'_>,
    counts: &mut Counts,
    instances: &mut Vec<(u32, u32)>,
) -> Result<()> {
    match payload {
        Payload::ComponentTypeSection(section) => counts.types += section.count(),
        Payload::ComponentImportSection(section) => {
            for import in section.clone() {
                match import?.ty {
                    ComponentTypeRef::Module(_) => counts.core_modules += 1,
                    ComponentTypeRef::Func(_) => counts.functions += 1,
                    ComponentTypeRef::Type(_) => counts.types += 1,
                    _ => {}
                }
            }
        }
        Payload::ComponentExportSection(section) => {
            for export in section.clone() {
                match export?.kind {
                    ComponentExternalKind::Module => counts.core_modules += 1,
                    ComponentExternalKind::Func => counts.functions += 1,
                    ComponentExternalKind::Type => counts.types += 1,
                    _ => {}
                }
            }
        }
        Payload::ComponentAliasSection(section) => {
            for alias in section.clone() {
                count_alias(&alias?, counts);
            }
        }
        Payload::ComponentCanonicalSection(section) => {
            for function in section.clone() {
                match function? {
                    CanonicalFunction::Lift { .. } => counts.functions += 1,
                    _ => counts.core_functions += 1,
                }
            }
        }
        Payload::InstanceSection(section) => {
            for instance in section.clone() {
                if let Instance::Instantiate { module_index, .. } = instance? {
                    instances.push((counts.core_instances, module_index));
                }
                counts.core_instances += 1;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The order of a module's sections, which is not that of their ids.
fn order(id: u8) -> u8 {
    const TAG: u8 = 13;
    const DATA_COUNT: u8 = 12;
    match id {
        TAG => 5,
        0..=5 => id,
        6..=9 => id,
        DATA_COUNT => 10,
        other => other + 1,
    }
}

const EXPORT_SECTION: u8 = 7;

/// A module with its mutable globals and memories exported as well.
fn rewrite_module(bytes: &[u8]) -> Result<(Vec<u8>, ModuleState)> {
    let mut state = ModuleState::default();
    let (mut imported_globals, mut imported_memories) = (0, 0);
    let mut exports = enc::ExportSection::new();
    let mut sections = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        match &payload {
            Payload::ImportSection(section) => {
                for import in section.clone().into_imports() {
                    match import?.ty {
                        TypeRef::Global(_) => imported_globals += 1,
                        TypeRef::Memory(_) => imported_memories += 1,
                        _ => {}
                    }
                }
            }
            Payload::GlobalSection(section) => {
                for (index, global) in (imported_globals..).zip(section.clone()) {
                    let ty = global?.ty;
                    if ty.mutable {
                        state.globals.push((index, ty.content_type));
                    }
                }
            }
            Payload::MemorySection(section) => {
                for (index, memory) in (imported_memories..).zip(section.clone()) {
                    state.memories.push((index, memory?));
                }
            }
            Payload::ExportSection(section) => {
                for export in section.clone() {
                    let export = export?;
                    exports.export(export.name, export_kind(export.kind), export.index);
                }
                continue;
            }
            _ => {}
        }
        if let Some((id, range)) = payload.as_section() {
            sections.push((id, range));
        }
    }
    for (index, _) in &state.globals {
        exports.export(&global_name(*index), enc::ExportKind::Global, *index);
    }
    for (index, _) in &state.memories {
        exports.export(&memory_name(*index), enc::ExportKind::Memory, *index);
    }
    let mut out = enc::Module::new();
    let mut is_exported = false;
    for (id, range) in sections {
        if id != 0 && order(EXPORT_SECTION) < order(id) && !is_exported {
            out.section(&exports);
            is_exported = true;
        }
        out.section(&enc::RawSection { id, data: part(bytes, &range)? });
    }
    if !is_exported {
        out.section(&exports);
    }
    Ok((out.finish(), state))
}

fn export_kind(kind: ExternalKind) -> enc::ExportKind {
    match kind {
        ExternalKind::Func | ExternalKind::FuncExact => enc::ExportKind::Func,
        ExternalKind::Table => enc::ExportKind::Table,
        ExternalKind::Memory => enc::ExportKind::Memory,
        ExternalKind::Global => enc::ExportKind::Global,
        ExternalKind::Tag => enc::ExportKind::Tag,
    }
}

fn global_name(index: u32) -> String {
    format!("__cofferdam_global_{index}")
}

fn memory_name(index: u32) -> String {
    format!("__cofferdam_memory_{index}")
}

/// The accessor module while it is being put together.
#[derive(Default)]
struct Accessor {
    imports: enc::ImportSection,
    functions: enc::FunctionSection,
    exports: enc::ExportSection,
    code: enc::CodeSection,
    /// Name and direction of each function: a getter gives a number, a setter takes one, growing
    /// does both.
    names: Vec<(String, Access)>,
    globals: u32,
    memories: u32,
}

impl Accessor {
    fn global(&mut self, instance: u32, index: u32, ty: ValType) {
        let (val_type, widen, narrow) = conversions(ty);
        let global = enc::GlobalType { val_type, mutable: true, shared: false };
        self.imports.import(&instance_name(instance), &global_name(index), global);
        let mut get = enc::Function::new([]);
        get.instruction(&enc::Instruction::GlobalGet(self.globals));
        widen.iter().for_each(|instruction| {
            get.instruction(instruction);
        });
        self.function(Access::Get, self.globals, get);
        let mut set = enc::Function::new([]);
        set.instruction(&enc::Instruction::LocalGet(0));
        narrow.iter().for_each(|instruction| {
            set.instruction(instruction);
        });
        set.instruction(&enc::Instruction::GlobalSet(self.globals));
        self.function(Access::Set, self.globals, set);
        self.globals += 1;
    }

    fn memory(&mut self, instance: u32, index: u32, ty: &MemoryType) {
        let memory = enc::MemoryType {
            minimum: ty.initial,
            maximum: ty.maximum,
            memory64: ty.memory64,
            shared: ty.shared,
            page_size_log2: ty.page_size_log2,
        };
        self.imports.import(&instance_name(instance), &memory_name(index), memory);
        let mut grow = enc::Function::new([]);
        grow.instruction(&enc::Instruction::LocalGet(0));
        grow.instruction(&enc::Instruction::I32WrapI64);
        grow.instruction(&enc::Instruction::MemoryGrow(self.memories));
        grow.instruction(&enc::Instruction::I64ExtendI32S);
        self.function(Access::Grow, self.memories, grow);
        self.memories += 1;
    }

    fn function(&mut self, access: Access, index: u32, mut body: enc::Function) {
        body.instruction(&enc::Instruction::End);
        let name = access.name(index as usize);
        let number = self.names.len() as u32;
        self.functions.function(access as u32);
        self.exports.export(&name, enc::ExportKind::Func, number);
        self.code.function(&body);
        self.names.push((name, access));
    }

    fn finish(&self) -> enc::Module {
        use enc::ValType::I64;
        let mut types = enc::TypeSection::new();
        // In the order of `Access`.
        types.ty().function([], [I64]);
        types.ty().function([I64], []);
        types.ty().function([I64], [I64]);
        let mut module = enc::Module::new();
        module.section(&types).section(&self.imports).section(&self.functions);
        module.section(&self.exports).section(&self.code);
        module
    }
}

fn instance_name(instance: u32) -> String {
    format!("instance-{instance}")
}

/// The encoder's type, and how its bits become and come from a 64-bit integer.
fn conversions(
    ty: ValType,
) -> (enc::ValType, &'static [enc::Instruction<'static>], &'static [enc::Instruction<'static>]) {
    use enc::Instruction as I;
    match ty {
        ValType::I64 => (enc::ValType::I64, &[], &[]),
        ValType::F64 => (enc::ValType::F64, &[I::I64ReinterpretF64], &[I::F64ReinterpretI64]),
        ValType::F32 => (
            enc::ValType::F32,
            &[I::I32ReinterpretF32, I::I64ExtendI32U],
            &[I::I32WrapI64, I::F32ReinterpretI32],
        ),
        // Validation lets no other type than i32 come here.
        _ => (enc::ValType::I32, &[I::I64ExtendI32U], &[I::I32WrapI64]),
    }
}

fn append_accessor(
    out: &mut enc::Component,
    counts: &Counts,
    modules: &[ModuleState],
    instances: &[(u32, u32)],
) {
    let mut accessor = Accessor::default();
    let mut arguments = Vec::new();
    for (instance, module) in instances {
        let Some(state) = modules.get(*module as usize) else { continue };
        if state.globals.is_empty() && state.memories.is_empty() {
            continue;
        }
        arguments.push((instance_name(*instance), enc::ModuleArg::Instance(*instance)));
        for (index, ty) in &state.globals {
            accessor.global(*instance, *index, *ty);
        }
        for (index, ty) in &state.memories {
            accessor.memory(*instance, *index, ty);
        }
    }
    out.section(&enc::ModuleSection(&accessor.finish()));
    let mut instantiate = enc::InstanceSection::new();
    instantiate.instantiate(counts.core_modules, arguments);
    out.section(&instantiate);

    let s64 = enc::ComponentValType::Primitive(enc::PrimitiveValType::S64);
    let mut types = enc::ComponentTypeSection::new();
    let none: [(&str, enc::ComponentValType); 0] = [];
    types.function().params(none).result(Some(s64));
    types.function().params([("value", s64)]).result(None);
    types.function().params([("value", s64)]).result(Some(s64));
    out.section(&types);

    let mut aliases = enc::ComponentAliasSection::new();
    let mut lifts = enc::CanonicalFunctionSection::new();
    let mut exports = enc::ComponentExportSection::new();
    for (number, (name, access)) in (0u32..).zip(&accessor.names) {
        aliases.alias(enc::Alias::CoreInstanceExport {
            instance: counts.core_instances,
            kind: enc::ExportKind::Func,
            name,
        });
        let no_options: [enc::CanonicalOption; 0] = [];
        lifts.lift(counts.core_functions + number, counts.types + *access as u32, no_options);
    }
    // Each export is itself a new function, so the lifted ones are numbered before the first.
    for (number, (name, _)) in (0u32..).zip(&accessor.names) {
        exports.export(
            name.as_str(),
            enc::ComponentExportKind::Func,
            counts.functions + number,
            None,
        );
    }
    out.section(&aliases).section(&lifts).section(&exports);
}
