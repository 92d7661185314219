//! Requests over time: which rows run in the next step, where their keys and values live, and which tokens follow.
//!
//! Plain integers and small structs: no tensors, no I/O, no clock of its own, no `unsafe`. [`Core`] is the deterministic heart, a
//! state machine with two strokes:
//!
//! ```text
//! while let Some(batch) = core.next_batch(now) {      // rows, positions, page tables, rows whose logits are wanted
//!     device.forward(&batch, &mut logits)?;            // any backend
//!     core.commit(&logits, now);                       // sample, detokenize, finish; events say what happened
//! }
//! ```
//!
//! A device that works by itself and draws tokens itself gets the next step, [`Core::next_ahead`], before the one in flight is committed, as
//! long as that can be planned without its tokens.
//!
//! [`Driver`] runs that loop on a thread of its own for any [`Device`] and hands events to waiting threads.
//! A token's logits are a function of its own sequence alone (the device's law), and every draw is keyed by (seed, position)
//! (the sampler's law), so scheduling, sharing, preemption and neighbours never change a request's tokens.
#![forbid(unsafe_code)]

mod admission;
mod ahead;
mod batch;
mod cache;
mod clock;
mod commit;
mod config;
mod core;
mod costs;
mod cut;
mod device;
mod digest;
mod draft_round;
mod draft_tree;
mod draw;
mod draw_layout;
mod draw_rows;
mod driver;
mod error;
mod event;
mod handover;
mod histogram;
mod holding;
mod invariants;
mod journal;
mod layout;
mod local;
mod logprobs;
mod lookup;
mod mailbox;
mod metrics;
mod outbox;
mod padding;
mod pages;
mod params;
#[cfg_attr(not(feature = "planted"), allow(dead_code, unreachable_pub))]
mod planted;
mod prefix;
mod queue;
mod random;
mod request;
mod restore;
mod sampler;
mod scheduler;
mod sequence;
mod session;
mod speculative;
mod tables;
mod text;
mod tier;
mod vector;
mod worker;

pub use crate::batch::{Batch, BatchSequence};
pub use crate::clock::{Clock, MonotonicClock};
pub use crate::config::{EngineConfig, LocalLayers, pages_at_once};
pub use crate::core::Core;
pub use crate::device::Device;
pub use crate::digest::Digest;
pub use crate::draft_tree::MOST_BRANCHES;
pub use crate::draw::{CHANGE_WORDS, Change, Choice, Draw, MOST_DRAW_WORDS, MOST_LOGPROBS};
pub use crate::draw_layout::{DRAW_BYTES, DrawKind, LOGPROB_VALUES};
pub use crate::driver::{Driver, SubmitOptions};
pub use crate::error::EngineError;
pub use crate::event::{Event, EventKind, Finish, FinishReason, StopReason};
pub use crate::handover::{Answer, Closed, Handover, OutsideDevice, Ticket, Work};
pub use crate::histogram::Histogram;
pub use crate::journal::{CacheEvent, TraceEvent, TraceKind};
pub use crate::logprobs::TokenLogprob;
pub use crate::mailbox::Journal;
pub use crate::metrics::{EngineMetrics, Histograms, RequestMetrics};
pub use crate::outbox::{RequestHandle, Update, Waker};
pub use crate::padding::{PROMPT_ROW_UNIT, SizeFields, SizeLimits, StepSize, padded};
pub use crate::params::SamplingParams;
#[cfg(feature = "planted")]
pub use crate::planted::{Bug, plant};
pub use crate::random::{stream_seed, uniform};
pub use crate::request::{Prompt, RequestId, RequestKind, RequestOptions, Submission};
pub use crate::sampler::{SampleError, Sampler, TokenHistory};
pub use crate::sequence::SequenceId;
pub use crate::session::Adoption;
pub use crate::speculative::Speculation;
pub use crate::tables::PageRef;
pub use crate::text::{TextFactory, TextStep, TokenText};
pub use crate::tier::{Fetch, Fetched, Offer, Save, Tier, TierPage, Wanted};
