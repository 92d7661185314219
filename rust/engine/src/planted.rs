//! Bugs that can be planted on purpose, to prove that the simulation would find such: `tests/planted.rs`. Each is a mistake that a change
//! of the scheduler, the cache or the tier's protocol could make. Without the feature `planted` every question here is false at
//! compile time and nothing is left of them.

/// A mistake, named by what goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it, and the places that ask
pub enum Bug {
    BlockedConsumerIsOverrun,
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
    LongContextIsMissed,
    MaxNumSeqsIsIgnored,
    MaxWaitingIsIgnored,
    PageIsSealedEarly,
    PenaltiesForgetPreempted,
    PositionIsOffByOne,
    PreemptedPagesLeak,
    PromptsStallDecodes,
    RestoreIsTakenForWhole,
    SaltIsIgnored,
    SampleDependsOnStep,
    SavesComeLate,
    SharedPageIsNotRetained,
    SharedPageIsWritten,
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

    impl Bug {
        /// All of them.
        pub const ALL: [Self; 32] = [
            Self::BlockedConsumerIsOverrun,
            Self::BudgetIsNotCharged,
            Self::CancelDuringStepIsLost,
            Self::CompletionsAreNotSpawned,
            Self::CopyIsForgotten,
            Self::CopyReachesTooFar,
            Self::DeadlineIsForgotten,
            Self::DigestIgnoresParent,
            Self::DraftsAreTrusted,
            Self::DuplicateIsNotRetained,
            Self::EndedSequenceKeepsPages,
            Self::EndedSequenceStaysQueued,
            Self::EvictedPageKeepsName,
            Self::FailedRowsCount,
            Self::HeldPageIsEvictable,
            Self::LongContextIsMissed,
            Self::MaxNumSeqsIsIgnored,
            Self::MaxWaitingIsIgnored,
            Self::PageIsSealedEarly,
            Self::PenaltiesForgetPreempted,
            Self::PositionIsOffByOne,
            Self::PreemptedPagesLeak,
            Self::PromptsStallDecodes,
            Self::RestoreIsTakenForWhole,
            Self::SaltIsIgnored,
            Self::SampleDependsOnStep,
            Self::SavesComeLate,
            Self::SharedPageIsNotRetained,
            Self::SharedPageIsWritten,
            Self::TailStaysBehind,
            Self::WholePromptIsReused,
            Self::WindowIsTooShort,
        ];
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
