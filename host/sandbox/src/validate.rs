//! Decides whether a component can be checkpointed: whether linear memories and mutable globals
//! are all the state that running it can change.

use wasmparser::{
    CanonicalFunction, ComponentOuterAliasKind, Instance, Operator, Parser, Payload, TypeRef,
};

/// Why a snapshot of memory would miss some of a component's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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
        instruction: &'static str,
    },
    /// A segment that may be gone.
    #[error("core module {module} drops a segment while it runs (`{instruction}`)")]
    SegmentDropped {
        /// The module's number.
        module: u32,
        /// What drops it.
        instruction: &'static str,
    },
    /// State in resources, tasks or streams of the component model.
    #[error("it uses `{what}` of the component model, whose state lies outside its memory")]
    CanonicalState {
        /// The built-in function.
        what: String,
    },
}

/// Reads a component and looks for state that a snapshot would miss.
///
/// # Errors
/// The first such state; or `Err(Ok(..))` where the bytes are not a component at all.
pub(crate) fn check(bytes: &[u8]) -> Result<(), Verdict> {
    let mut depth = 0u32;
    let mut modules = 0u32;
    let mut instantiated: Vec<u32> = Vec::new();
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::ModuleSection { .. } if depth == 0 => {
                depth += 1;
                modules += 1;
            }
            Payload::ModuleSection { .. } => return Err(Unsound::NestedComponent.into()),
            // wit-component makes components without code only to re-export instances.
            Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::InstanceSection(section) => {
                for instance in section {
                    if let Instance::Instantiate { module_index, .. } = instance? {
                        instantiated.push(module_index);
                    }
                }
            }
            Payload::ComponentAliasSection(section) => {
                for alias in section {
                    if let wasmparser::ComponentAlias::Outer {
                        kind: ComponentOuterAliasKind::CoreModule,
                        ..
                    } = alias?
                    {
                        return Err(Unsound::NestedComponent.into());
                    }
                }
            }
            Payload::ComponentCanonicalSection(section) => {
                for function in section {
                    check_canonical(&function?)?;
                }
            }
            payload if 0 < modules => check_module(modules - 1, payload)?,
            _ => {}
        }
    }
    for module in 0..modules {
        let count = instantiated.iter().filter(|index| **index == module).count();
        if 1 < count {
            return Err(Unsound::InstantiatedAgain { module, count }.into());
        }
    }
    Ok(())
}

/// Why a component was not accepted.
#[derive(Debug)]
pub(crate) enum Verdict {
    Malformed(wasmparser::BinaryReaderError),
    Unsound(Unsound),
}

impl From<wasmparser::BinaryReaderError> for Verdict {
    fn from(error: wasmparser::BinaryReaderError) -> Self {
        Self::Malformed(error)
    }
}

impl From<Unsound> for Verdict {
    fn from(unsound: Unsound) -> Self {
        Self::Unsound(unsound)
    }
}

/// Lifting, lowering and dropping handles of the host keep no state of the component's own.
fn check_canonical(function: &CanonicalFunction) -> Result<(), Verdict> {
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

fn check_module(module: u32, payload: Payload<'_>) -> Result<(), Verdict> {
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
        Payload::CodeSectionEntry(body) => {
            for operator in body.get_operators_reader()? {
                check_operator(module, &operator?)?;
            }
        }
        _ => {}
    }
    Ok(())
}

pub(crate) fn is_number(ty: wasmparser::ValType) -> bool {
    use wasmparser::ValType::{F32, F64, I32, I64};
    matches!(ty, I32 | I64 | F32 | F64)
}

fn check_operator(module: u32, operator: &Operator<'_>) -> Result<(), Verdict> {
    let instruction = match operator {
        Operator::TableSet { .. } => "table.set",
        Operator::TableGrow { .. } => "table.grow",
        Operator::TableFill { .. } => "table.fill",
        Operator::TableCopy { .. } => "table.copy",
        Operator::TableInit { .. } => "table.init",
        Operator::DataDrop { .. } => {
            return Err(Unsound::SegmentDropped { module, instruction: "data.drop" }.into());
        }
        Operator::ElemDrop { .. } => {
            return Err(Unsound::SegmentDropped { module, instruction: "elem.drop" }.into());
        }
        _ => return Ok(()),
    };
    Err(Unsound::TableChanges { module, instruction }.into())
}
