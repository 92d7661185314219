//! The second stroke of a step: logits become tokens, text and ends.

use std::time::Duration;

use crate::core::{Core, Scheduled};
use crate::event::{EventKind, Finish, FinishReason, StopReason};
use crate::logprobs::token_logprobs;
use crate::request::{RequestId, RequestKind};
use crate::sampler::{SampleError, check};
use crate::sequence::SequenceId;
use crate::text::TextStep;

impl Core {
    /// Takes the logits of the batch in flight: (logit_rows, vocabulary).
    ///
    /// A row that gives no token fails its own request only. Logits of the wrong length fail the batch, as [`Core::fail`] does.
    ///
    /// # Panics
    /// When no batch is in flight.
    pub fn commit(&mut self, logits: &[f32], now: Duration) {
        let scheduled = self.in_flight.take().expect("commit was called without a step in flight");
        let rows: usize = scheduled.iter().map(|work| work.prompt_rows + usize::from(work.samples)).sum();
        if logits.len() != rows * self.config.vocabulary {
            let message = format!(
                "the device returned {} logits instead of {rows} x {}",
                logits.len(),
                self.config.vocabulary
            );
            self.in_flight = Some(scheduled);
            return self.fail(&message, now);
        }
        self.settle_cancelled(now);
        let mut rest = logits;
        for work in scheduled {
            let (own, others) =
                rest.split_at((work.prompt_rows + usize::from(work.samples)) * self.config.vocabulary);
            rest = others;
            // Gone when its request was cancelled, or failed in a completion before it.
            if self.sequences.contains_key(&work.id) {
                self.commit_rows(work, own, now);
            }
        }
        self.check_invariants();
    }

    /// The step in flight failed: its requests end with [`FinishReason::Error`], the others go on.
    ///
    /// # Panics
    /// When no batch is in flight.
    pub fn fail(&mut self, message: &str, now: Duration) {
        let scheduled = self.in_flight.take().expect("fail was called without a step in flight");
        self.settle_cancelled(now);
        for work in scheduled {
            self.end_request(work.id.request, FinishReason::Error, Some(message.to_owned()), now);
        }
        self.check_invariants();
    }

    fn settle_cancelled(&mut self, now: Duration) {
        for id in std::mem::take(&mut self.cancelled) {
            self.end_request(id, FinishReason::Abort, None, now);
        }
    }

    fn commit_rows(&mut self, work: Scheduled, logits: &[f32], now: Duration) {
        let id = work.id;
        let (prompt, sampled) = logits.split_at(work.prompt_rows * self.config.vocabulary);
        let outcome = self
            .deliver_prompt_rows(id, prompt)
            .and_then(|()| if work.samples { self.choose(id, sampled, now).map(Some) } else { Ok(None) });
        // Rows that gave NaN are not named: nobody should find their keys and values.
        if outcome.is_ok() {
            self.sequence(id).computed += work.rows;
            self.seal_pages(id);
        }
        match outcome {
            Err(error) => self.end_request(id.request, FinishReason::Error, Some(error.to_string()), now),
            Ok(Some(token)) => self.append(id, token, sampled, now),
            Ok(None) => self.finish_logits(id, now),
        }
    }

    fn sequence(&mut self, id: SequenceId) -> &mut crate::sequence::Sequence {
        self.sequences.get_mut(&id).expect("a committed sequence exists")
    }

    fn deliver_prompt_rows(&mut self, id: SequenceId, logits: &[f32]) -> Result<(), SampleError> {
        if logits.is_empty() {
            return Ok(());
        }
        let vocabulary = self.config.vocabulary;
        let request = &self.requests[&id.request];
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        let first = sequence.delivered;
        sequence.delivered += logits.len() / vocabulary;
        let kind = match &request.kind {
            RequestKind::Logits => {
                sequence.blocked = sequence.delivered < request.prompt.len();
                EventKind::Logits(logits.to_vec())
            }
            RequestKind::Generate(params) => {
                logits.chunks_exact(vocabulary).try_for_each(check)?;
                let count = params.prompt_logprobs.unwrap_or(0);
                let next = request.prompt[first + 1..].iter();
                let rows = logits.chunks_exact(vocabulary).zip(next);
                let scratch = &mut self.sampler.scratch;
                EventKind::PromptLogprobs(
                    rows.map(|(row, &token)| token_logprobs(row, token, count, scratch)).collect(),
                )
            }
        };
        self.emit(id.request, kind);
        Ok(())
    }

    /// Names the pages that became full, so that others can share them.
    fn seal_pages(&mut self, id: SequenceId) {
        // Without a prefix cache only the completions of one request share, so a single one has nobody to share with.
        if !self.config.enable_prefix_caching && self.requests[&id.request].ended.len() == 1 {
            return;
        }
        let page_tokens = self.config.page_tokens;
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        while (sequence.sealed + 1) * page_tokens <= sequence.computed {
            let (parent, place) = (sequence.parent(), sequence.sealed);
            let tokens = sequence.tokens.range(place * page_tokens, (place + 1) * page_tokens);
            sequence.pages[place] = self.cache.seal(parent, tokens, sequence.pages[place]);
            sequence.sealed += 1;
        }
    }

    fn choose(&mut self, id: SequenceId, logits: &[f32], now: Duration) -> Result<u32, SampleError> {
        let request = self.requests.get_mut(&id.request).expect("a sequence has a request");
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        let RequestKind::Generate(params) = &request.kind else {
            unreachable!("only Generate rows are sampled")
        };
        let too_early = sequence.tokens.output.len() < params.min_tokens;
        let banned: &[u32] = if too_early { &request.stop_tokens } else { &[] };
        let position = sequence.tokens.len() as u64;
        let token =
            self.sampler.sample(logits, params, &sequence.history, banned, sequence.seed, position)?;
        if params.has_penalties() {
            *sequence.history.output.entry(token).or_default() += 1;
        }
        sequence.tokens.output.push(token);
        sequence.first_token.get_or_insert(now);
        sequence.last_token = now;
        request.metrics.first_token.get_or_insert(now);
        request.metrics.generated_tokens += 1;
        self.counters.generated_tokens += 1;
        Ok(token)
    }

    /// Reports the new token, starts the request's other completions after their first, and ends the completion if it is time.
    fn append(&mut self, id: SequenceId, token: u32, logits: &[f32], now: Duration) {
        self.spawn_others(id.request);
        let request = &self.requests[&id.request];
        let params = request.params().expect("only Generate rows are sampled");
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        let generated = sequence.tokens.output.len();
        let stop_token = request.stop_tokens.binary_search(&token).is_ok();
        let mut step = TextStep::default();
        let shown = params.detokenize && (!stop_token || params.include_stop_str_in_output);
        if let Some(text) = sequence.text.as_mut().filter(|_| shown) {
            step = text.push(token, generated >= params.min_tokens && !stop_token);
        }
        let mut finish = None;
        if stop_token {
            // An end-of-sequence token needs no reason; the request's own stop tokens are named, as in vLLM.
            let end = self.config.eos_token_ids.contains(&token) && !params.ignore_eos;
            let stop = (!end).then_some(StopReason::Token(token));
            finish = Some(Finish { reason: FinishReason::Stop, stop });
        } else if let Some(stop) = step.stopped.take() {
            finish = Some(Finish { reason: FinishReason::Stop, stop: Some(StopReason::Text(stop)) });
        } else if generated >= request.max_output {
            finish = Some(Finish::because(FinishReason::Length));
        }
        let logprobs =
            params.logprobs.map(|count| token_logprobs(logits, token, count, &mut self.sampler.scratch));
        self.emit(id.request, EventKind::Token { index: id.index, token, text: step.text, logprobs });
        if let Some(finish) = finish {
            self.finish_text(id, finish, now);
        }
    }

    fn spawn_others(&mut self, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("a sequence has a request");
        if !std::mem::replace(&mut request.spawned, true) {
            for index in 1..request.ended.len() as u32 {
                self.spawn(SequenceId { request: id, index });
            }
        }
    }

    /// Ends a completion, letting out the text that was held back; the last piece may still complete a stop string.
    fn finish_text(&mut self, id: SequenceId, mut finish: Finish, now: Duration) {
        let detokenize = self.requests[&id.request].params().is_some_and(|params| params.detokenize);
        let stopped_by_text = matches!(finish.stop, Some(StopReason::Text(_)));
        let mut step = TextStep::default();
        if let Some(text) = self.sequence(id).text.as_mut().filter(|_| detokenize && !stopped_by_text) {
            step = text.finish();
        }
        if let Some(stop) = step.stopped.filter(|_| finish.reason == FinishReason::Length) {
            finish = Finish { reason: FinishReason::Stop, stop: Some(StopReason::Text(stop)) };
        }
        self.end_sequence(id, step.text, finish, now);
    }

    /// Ends a logits request whose last row was delivered.
    fn finish_logits(&mut self, id: SequenceId, now: Duration) {
        let request = &self.requests[&id.request];
        let all = request.prompt.len();
        if matches!(request.kind, RequestKind::Logits) && self.sequences[&id].delivered == all {
            self.end_request(id.request, FinishReason::Stop, None, now);
        }
    }
}
