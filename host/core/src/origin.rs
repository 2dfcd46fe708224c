//! Decides what a run begins from: its own newest checkpoint, a savepoint that is named, or nothing.

/// What was found before a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The list of the job's own checkpoints is lost: what there was is unknown.
    pub is_headless: bool,
    /// The job has a checkpoint of its own.
    pub has_own: bool,
    /// A savepoint or a checkpoint of another job is named; `Some(true)`: the job has begun from it earlier.
    pub named: Option<bool>,
}

/// What a run begins from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Its own newest checkpoint that is whole; where it has none at all, nothing.
    Own,
    /// The same, although another one is named: the job has begun from that earlier.
    OwnAfterNamed,
    /// What is named.
    Named,
}

/// Why a run cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoOrigin {
    /// To begin from the beginning, or from what is named, might repeat what was already committed.
    Headless,
    /// What is named would replace checkpoints that do not descend from it.
    Occupied,
}

/// What a run begins from.
///
/// # Errors
/// Where each choice could lose or repeat records.
pub fn origin(found: Found) -> Result<Origin, NoOrigin> {
    match found {
        Found { is_headless: true, .. } => Err(NoOrigin::Headless),
        Found { named: None, .. } => Ok(Origin::Own),
        Found { named: Some(_), has_own: false, .. } => Ok(Origin::Named),
        Found { named: Some(true), has_own: true, .. } => Ok(Origin::OwnAfterNamed),
        Found { named: Some(false), has_own: true, .. } => Err(NoOrigin::Occupied),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_begins_from_what_loses_and_repeats_nothing() {
        let rows = [
            // headless, own, named: what it begins from
            (false, false, None, Ok(Origin::Own)),
            (false, true, None, Ok(Origin::Own)),
            (false, false, Some(false), Ok(Origin::Named)),
            (false, false, Some(true), Ok(Origin::Named)),
            (false, true, Some(true), Ok(Origin::OwnAfterNamed)),
            (false, true, Some(false), Err(NoOrigin::Occupied)),
        ];
        for (is_headless, has_own, named, expected) in rows {
            assert_eq!(origin(Found { is_headless, has_own, named }), expected);
            let headless = origin(Found { is_headless: true, has_own, named });
            assert_eq!(headless, Err(NoOrigin::Headless));
        }
    }
}
