//! Bugs that can be planted on purpose, to prove that the simulation would find such: `tests/planted.rs`. Each is a mistake that a change
//! of the scheduler, the cache or the tier's protocol could make. Without the feature `planted` every question here is false at
//! compile time and nothing is left of them.

macro_rules! bugs {
    ($($bug:ident),* $(,)?) => {
        /// A mistake, named by what goes wrong.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)] // the names say it, and the places that ask
        pub enum Bug {
            $($bug,)*
        }

        #[cfg(feature = "planted")]
        impl Bug {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$bug),*];
        }
    };
}

bugs! {
    AheadIsOfAnotherRow,
    AheadPassesTheSwitch,
    BlockedConsumerIsOverrun,
    BranchIsNotFollowed,
    BranchKeepsPages,
    BranchPageIsNotCopied,
    BranchSharesPages,
    BudgetIsNotCharged,
    CancelDuringStepIsLost,
    CompletionsAreNotSpawned,
    CopyIsForgotten,
    CopyReachesTooFar,
    DeadlineIsForgotten,
    DigestIgnoresParent,
    DraftsAreTrusted,
    DuplicateIsNotRetained,
    EndedSequenceKeepsPages,
    EndedSequenceStaysQueued,
    EvictedPageKeepsName,
    FailedRowsCount,
    HeldPageIsEvictable,
    LatestTokenIsNotCounted,
    LocalGapIsIgnored,
    LocalPageIsNotCopied,
    LongContextIsMissed,
    MaxNumSeqsIsIgnored,
    MaxWaitingIsIgnored,
    PageIsSealedEarly,
    PenaltiesForgetPreempted,
    PositionIsOffByOne,
    PreemptedPagesLeak,
    PromptsStallDecodes,
    RestoreIgnoresGaps,
    RestoreIsTakenForWhole,
    SaltIsIgnored,
    SampleDependsOnStep,
    SavesComeLate,
    SharedPageIsNotRetained,
    SharedPageIsWritten,
    SiblingIsTakenForTwin,
    TailStaysBehind,
    WholePromptIsReused,
    WindowIsTooShort,
}

#[cfg(feature = "planted")]
mod current {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static CURRENT: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in all engines that this thread drives, or pulls it out again; the one before is returned.
    pub fn plant(bug: Option<Bug>) -> Option<Bug> {
        CURRENT.replace(bug)
    }

    pub(crate) fn planted(bug: Bug) -> bool {
        CURRENT.get() == Some(bug)
    }
}

#[cfg(feature = "planted")]
pub use current::plant;
#[cfg(feature = "planted")]
pub(crate) use current::planted;

/// Whether this bug is planted.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
