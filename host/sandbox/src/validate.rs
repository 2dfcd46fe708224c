//! Decides whether a component can be checkpointed: whether linear memories and mutable globals
//! are all the state that running it can change.

#![warn(clippy::indexing_slicing, reason = "what is read is a tenant's")]

use wasmparser::{
    CanonicalFunction, ComponentAlias, ComponentExternalKind, ComponentOuterAliasKind,
    ComponentTypeRef, Instance, Operator, Parser, Payload, TypeRef, WasmFeatures,
};

/// Why a snapshot of memory would miss some of a component's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Unsound {
    /// Two instances of one module have memories of their own behind the same names.
    #[error(
        "core module {module} is instantiated {count} times; only one instance can be followed"
    )]
    InstantiatedAgain {
        /// The module's number.
        module: u32,
        /// How often.
        count: usize,
    },
    /// A component inside the component.
    #[error("it contains another component; compose it into one, or split it into two operators")]
    NestedComponent,
    /// A core module that does not lie in the component itself, so its instances cannot be followed.
    #[error(
        "it imports, exports or passes on a core module; only modules of its own can be followed"
    )]
    ForeignModule,
    /// A name that the host gives to what it adds.
    #[error("it exports `{name}`, a name that is the host's")]
    ReservedName {
        /// The name.
        name: String,
    },
    /// A part of a component that nobody has looked at.
    #[error("it has a section that operators have no use for: {what}")]
    UnknownSection {
        /// Which.
        what: String,
    },
    /// A memory that other threads may change.
    #[error("core module {module} has a shared memory; build it without threads")]
    SharedMemory {
        /// The module's number.
        module: u32,
    },
    /// A memory with 64-bit addresses.
    #[error("core module {module} has a 64-bit memory, which is not supported")]
    Memory64 {
        /// The module's number.
        module: u32,
    },
    /// A memory that belongs to another module, as adapters of WASI preview 1 have it.
    #[error(
        "core module {module} imports a memory, as the adapter of WASI preview 1 does; \
         build for wasm32-wasip2"
    )]
    ImportedMemory {
        /// The module's number.
        module: u32,
    },
    /// A global that changes and is not a number.
    #[error("core module {module} has a mutable global that is not a 32- or 64-bit number")]
    GlobalOfReferences {
        /// The module's number.
        module: u32,
    },
    /// A mutable global that belongs to another module.
    #[error("core module {module} imports a mutable global")]
    ImportedGlobal {
        /// The module's number.
        module: u32,
    },
    /// A table that changes while the component runs.
    #[error("core module {module} changes a table while it runs (`{instruction}`)")]
    TableChanges {
        /// The module's number.
        module: u32,
        /// What changes it.
        instruction: String,
    },
    /// A segment that may be gone.
    #[error("core module {module} drops a segment while it runs (`{instruction}`)")]
    SegmentDropped {
        /// The module's number.
        module: u32,
        /// What drops it.
        instruction: String,
    },
    /// State in resources, tasks or streams of the component model.
    #[error("it uses `{what}` of the component model, whose state lies outside its memory")]
    CanonicalState {
        /// The built-in function.
        what: String,
    },
}

/// The version of the checks, of the rewriting, and of what both promise: compiled code is trusted only
/// if it has passed the same.
pub(crate) const VERSION: u32 = 2;

/// What the host's own exports begin with, of components and of modules.
pub(crate) const RESERVED: [&str; 2] = ["cofferdam-", "__cofferdam"];

/// What is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    /// The component itself.
    Component,
    /// One within it, which may only pass on what it is given.
    Nested,
    /// A core module, by its number.
    Module(u32),
}

/// Reads a component and looks for state that a snapshot would miss. What is not known to be harmless is
/// refused: sections are allowed by name, and core modules come from one place only.
///
/// # Errors
/// The first such state, or why the bytes are no component.
pub(crate) fn check(bytes: &[u8]) -> Result<(), ValidateError> {
    let mut levels: Vec<Level> = Vec::new();
    let mut modules = 0u32;
    let mut instantiated: Vec<u32> = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        let payload = payload?;
        let level = levels.last().copied();
        match (&payload, level) {
            (Payload::Version { .. }, None) => levels.push(Level::Component),
            // Those within were pushed by the section that holds them.
            (Payload::Version { .. } | Payload::CustomSection(_), _) => {}
            (Payload::End(_), _) => {
                levels.pop();
            }
            (_, Some(Level::Module(module))) => check_module(module, payload)?,
            (Payload::ModuleSection { .. }, Some(Level::Component)) => {
                levels.push(Level::Module(modules));
                modules += 1;
            }
            (Payload::ModuleSection { .. }, _) => return Err(Unsound::NestedComponent.into()),
            // wit-component makes components without code only to re-export instances.
            (Payload::ComponentSection { .. }, _) => levels.push(Level::Nested),
            (Payload::InstanceSection(section), Some(Level::Component)) => {
                for instance in section.clone() {
                    if let Instance::Instantiate { module_index, .. } = instance? {
                        instantiated.push(module_index);
                    }
                }
            }
            (_, level) => check_section(&payload, level == Some(Level::Component))?,
        }
    }
    // Modules have no other source than those sections, so a number is that of a module here.
    for module in 0..modules {
        let count = instantiated.iter().filter(|index| **index == module).count();
        if 1 < count {
            return Err(Unsound::InstantiatedAgain { module, count }.into());
        }
    }
    match instantiated.iter().any(|index| modules <= *index) {
        true => Err(Unsound::ForeignModule.into()),
        false => Ok(()),
    }
}

/// A section of a component, but for those that define core modules and their instances.
fn check_section(payload: &Payload<'_>, is_outermost: bool) -> Result<(), ValidateError> {
    match payload {
        Payload::ComponentTypeSection(_)
        | Payload::CoreTypeSection(_)
        | Payload::ComponentInstanceSection(_) => Ok(()),
        Payload::ComponentImportSection(section) => {
            for import in section.clone() {
                if let ComponentTypeRef::Module(_) = import?.ty {
                    return Err(Unsound::ForeignModule.into());
                }
            }
            Ok(())
        }
        Payload::ComponentExportSection(section) => {
            for export in section.clone() {
                let export = export?;
                if export.kind == ComponentExternalKind::Module {
                    return Err(Unsound::ForeignModule.into());
                }
                if is_outermost {
                    check_name(export.name.name)?;
                }
            }
            Ok(())
        }
        Payload::ComponentAliasSection(section) => {
            for alias in section.clone() {
                match alias? {
                    ComponentAlias::Outer { kind: ComponentOuterAliasKind::CoreModule, .. }
                    | ComponentAlias::InstanceExport {
                        kind: ComponentExternalKind::Module, ..
                    } => return Err(Unsound::ForeignModule.into()),
                    _ => {}
                }
            }
            Ok(())
        }
        Payload::ComponentCanonicalSection(section) if is_outermost => {
            for function in section.clone() {
                check_canonical(&function?)?;
            }
            Ok(())
        }
        other => Err(unknown(other)),
    }
}

fn unknown(payload: &Payload<'_>) -> ValidateError {
    let name = format!("{payload:?}");
    let what = name.split([' ', '{', '(']).next().unwrap_or_default().to_owned();
    Unsound::UnknownSection { what }.into()
}

fn check_name(name: &str) -> Result<(), ValidateError> {
    match RESERVED.iter().any(|reserved| name.starts_with(reserved)) {
        true => Err(Unsound::ReservedName { name: name.chars().take(80).collect() }.into()),
        false => Ok(()),
    }
}

/// What the engine runs: what it does not is refused here, in words that say so.
pub(crate) fn features() -> WasmFeatures {
    let without = WasmFeatures::GC
        | WasmFeatures::EXCEPTIONS
        | WasmFeatures::LEGACY_EXCEPTIONS
        | WasmFeatures::MEMORY64
        // Each memory is a file of the host's, and compilers make one for each module. What the host adds has several.
        | WasmFeatures::MULTI_MEMORY;
    WasmFeatures::default() - without
}

/// Why a component was not accepted.
#[derive(Debug)]
pub(crate) enum ValidateError {
    Malformed(String),
    Unsound(Unsound),
}

impl From<wasmparser::BinaryReaderError> for ValidateError {
    fn from(error: wasmparser::BinaryReaderError) -> Self {
        Self::Malformed(error.to_string())
    }
}

impl From<Unsound> for ValidateError {
    fn from(unsound: Unsound) -> Self {
        Self::Unsound(unsound)
    }
}

/// Lifting, lowering and dropping handles of the host keep no state of the component's own.
fn check_canonical(function: &CanonicalFunction) -> Result<(), ValidateError> {
    use wasmparser::CanonicalOption;
    match function {
        CanonicalFunction::Lift { options, .. } | CanonicalFunction::Lower { options, .. } => {
            if options.iter().any(|option| matches!(option, CanonicalOption::Async)) {
                return Err(Unsound::CanonicalState { what: "async".to_owned() }.into());
            }
            Ok(())
        }
        CanonicalFunction::ResourceDrop { .. } => Ok(()),
        other => {
            let name = format!("{other:?}");
            let what = name.split([' ', '{', '(']).next().unwrap_or_default().to_owned();
            Err(Unsound::CanonicalState { what }.into())
        }
    }
}

fn check_module(module: u32, payload: Payload<'_>) -> Result<(), ValidateError> {
    match payload {
        Payload::ImportSection(section) => {
            for import in section.into_imports() {
                match import?.ty {
                    TypeRef::Memory(_) => return Err(Unsound::ImportedMemory { module }.into()),
                    TypeRef::Global(global) if global.mutable => {
                        return Err(Unsound::ImportedGlobal { module }.into());
                    }
                    _ => {}
                }
            }
        }
        Payload::MemorySection(section) => {
            for memory in section {
                let memory = memory?;
                if memory.shared {
                    return Err(Unsound::SharedMemory { module }.into());
                }
                if memory.memory64 {
                    return Err(Unsound::Memory64 { module }.into());
                }
            }
        }
        Payload::GlobalSection(section) => {
            for global in section {
                let ty = global?.ty;
                if ty.mutable && !is_number(ty.content_type) {
                    return Err(Unsound::GlobalOfReferences { module }.into());
                }
            }
        }
        Payload::ExportSection(section) => {
            for export in section {
                check_name(export?.name)?;
            }
        }
        Payload::CodeSectionEntry(body) => {
            for operator in body.get_operators_reader()? {
                check_operator(module, &operator?)?;
            }
        }
        Payload::TypeSection(_)
        | Payload::FunctionSection(_)
        | Payload::TableSection(_)
        | Payload::StartSection { .. }
        | Payload::ElementSection(_)
        | Payload::DataCountSection { .. }
        | Payload::DataSection(_)
        | Payload::CodeSectionStart { .. } => {}
        other => return Err(unknown(&other)),
    }
    Ok(())
}

pub(crate) fn is_number(ty: wasmparser::ValType) -> bool {
    use wasmparser::ValType::{F32, F64, I32, I64};
    matches!(ty, I32 | I64 | F32 | F64)
}

fn check_operator(module: u32, operator: &Operator<'_>) -> Result<(), ValidateError> {
    let instruction = match operator {
        Operator::TableSet { .. } => "table.set",
        Operator::TableGrow { .. } => "table.grow",
        Operator::TableFill { .. } => "table.fill",
        Operator::TableCopy { .. } => "table.copy",
        Operator::TableInit { .. } => "table.init",
        Operator::DataDrop { .. } => {
            return Err(
                Unsound::SegmentDropped { module, instruction: "data.drop".to_owned() }.into()
            );
        }
        Operator::ElemDrop { .. } => {
            return Err(
                Unsound::SegmentDropped { module, instruction: "elem.drop".to_owned() }.into()
            );
        }
        _ => return Ok(()),
    };
    Err(Unsound::TableChanges { module, instruction: instruction.to_owned() }.into())
}
