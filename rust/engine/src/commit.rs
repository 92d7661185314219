//! The second stroke of a step: logits become tokens, text and ends.

use std::time::Duration;

use crate::batch::Scheduled;
use crate::core::Core;
use crate::draft_tree::{Branch, Verified};
use crate::draw::{Changes, Choice};
use crate::draw_rows::{DrawnRow, DrawnRows, PromptLogprobs};
use crate::event::{EventKind, Finish, FinishReason, StopReason};
use crate::journal::TraceKind;
use crate::logprobs::TokenLogprob;
use crate::metrics::RequestMetrics;
use crate::params::SamplingParams;
use crate::planted::{Bug, planted};
use crate::request::{RequestId, RequestKind};
use crate::sampler::SampleError;
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
        self.commit_choices(logits, Vec::new(), now);
    }

    /// As [`Core::commit`], from a device that chose tokens itself: see [`crate::Device::take_choices`].
    ///
    /// # Panics
    /// When no batch is in flight.
    pub fn commit_choices(&mut self, logits: &[f32], mut choices: Vec<Choice>, now: Duration) {
        let flight = self.in_flight.pop_front().expect("commit was called without a step in flight");
        let scheduled = &flight.scheduled;
        let all: usize = scheduled.iter().map(Scheduled::logit_rows).sum();
        let drawn: usize = scheduled.iter().filter(|work| work.drawn).map(Scheduled::samples).sum();
        let chosen = if choices.is_empty() { 0 } else { drawn };
        let rows = all - chosen;
        if logits.len() != rows * self.config.vocabulary || choices.len() != chosen {
            let (found, vocabulary) = (logits.len(), self.config.vocabulary);
            let message = format!(
                "the device returned {found} logits and {} choices instead of {rows} x {vocabulary} and {chosen}",
                choices.len()
            );
            self.in_flight.push_front(flight);
            self.drawn = DrawnRows::default();
            return self.fail(&message, now);
        }
        // A step that was begun while another was computed had the device for itself only afterwards.
        let took = now.saturating_sub(flight.started.max(self.step_ended));
        self.step_ended = now;
        let decoding = scheduled.iter().filter(|work| work.rows == work.sampled_rows);
        let decoding = decoding.map(Scheduled::all_rows).sum();
        self.costs.computed(scheduled.iter().map(Scheduled::all_rows).sum(), decoding, took);
        self.counters.histograms.step_time.add(took.as_secs_f64());
        self.charge_energy(&flight.scheduled, took);
        self.settle_cancelled(now);
        let (mut rest, mut left) = (logits, choices.as_mut_slice());
        for work in &flight.scheduled {
            let rows = if work.drawn && chosen > 0 { work.prompt_rows } else { work.logit_rows() };
            let (own, others) = rest.split_at(rows * self.config.vocabulary);
            let (chosen, later) =
                left.split_at_mut(if rows < work.logit_rows() { work.samples() } else { 0 });
            (rest, left) = (others, later);
            // Gone when its request was cancelled, or failed in a completion before it.
            if self.sequences.contains_key(&work.id) {
                self.commit_rows(work, own, chosen, now);
            }
        }
        self.drawn = DrawnRows::default();
        self.check_invariants();
    }

    /// The step in flight failed: its requests end with [`FinishReason::Error`], the others go on.
    ///
    /// # Panics
    /// When no batch is in flight.
    pub fn fail(&mut self, message: &str, now: Duration) {
        let flight = self.in_flight.pop_front().expect("fail was called without a step in flight");
        let scheduled = flight.scheduled;
        self.step_ended = now;
        for work in scheduled.iter().filter(|work| work.copied) {
            // Nobody knows whether the copy was made: what it should hold is not to be found.
            if let Some(sequence) = self.sequences.get_mut(&work.id) {
                sequence.computed = sequence.sealed * self.config.page_tokens;
            }
        }
        self.settle_cancelled(now);
        for work in &scheduled {
            if planted(Bug::FailedRowsCount) && work.sampled_rows < 2 && self.sequences.contains_key(&work.id)
            {
                self.advance(work.id, work.rows);
            }
        }
        for work in scheduled {
            self.end_request(work.id.request, FinishReason::Error, Some(message.to_owned()), now);
        }
        self.check_invariants();
    }

    /// Shares a step's energy out among its requests, by rows.
    fn charge_energy(&mut self, scheduled: &[Scheduled], took: Duration) {
        let Some(joules) = self.watts.map(|watts| watts * took.as_secs_f64()) else { return };
        *self.counters.joules.get_or_insert(0.0) += joules;
        let rows: usize = scheduled.iter().map(Scheduled::all_rows).sum();
        for work in scheduled {
            if let Some(request) = self.requests.get_mut(&work.id.request) {
                let share = (joules * 1e6 * work.all_rows() as f64 / rows as f64) as u64;
                *request.metrics.microjoules.get_or_insert(0) += share;
            }
        }
    }

    fn settle_cancelled(&mut self, now: Duration) {
        for (id, reason) in std::mem::take(&mut self.cancelled) {
            self.end_request(id, reason, None, now);
        }
    }

    fn commit_rows(&mut self, work: &Scheduled, logits: &[f32], choices: &mut [Choice], now: Duration) {
        let id = work.id;
        let (prompt, sampled) = logits.split_at(work.prompt_rows * self.config.vocabulary);
        let delivered = self.deliver_prompt_rows(id, prompt);
        let outcome = match delivered {
            Ok(()) if work.sampled_rows == 0 => {
                self.advance(id, work.rows);
                self.finish_logits(id, now);
                Ok(())
            }
            Ok(()) => self.commit_samples(work, sampled, choices, now),
            Err(error) => Err(error),
        };
        if let Err(error) = outcome {
            self.end_request(id.request, FinishReason::Error, Some(error.to_string()), now);
        }
    }

    /// Chooses a token from row after row, as long as each is a draft that another row was computed with: from logits, unless the device
    /// chose already.
    fn commit_samples(
        &mut self,
        work: &Scheduled,
        logits: &[f32],
        choices: &mut [Choice],
        now: Duration,
    ) -> Result<(), SampleError> {
        let id = work.id;
        let all_wanted = self.config.device_draws;
        let sequence = self.sequence(id);
        let before = sequence.first_token.map(|_| sequence.last_token);
        let own = |branch: &Branch| branch.drafts.len() - branch.shared;
        let drafted = sequence.drafts.len() + sequence.branches.iter().map(own).sum::<usize>();
        let drafts = Verified::take(sequence, all_wanted);
        let mut drawn = self.drawn.tokens.remove(&id);
        self.count_drafts(id.request, drafted);
        let (mut chosen, mut path) = (0, 0);
        let mut tokens = Vec::new(); // that were chosen, where there are drafts to compare
        loop {
            let place = drafts.row(path, chosen);
            let row = logits.chunks_exact(self.config.vocabulary).nth(place).unwrap_or_default();
            // Rows that gave NaN are not named: nobody should find their keys and values.
            let device = choices.get_mut(place).map(|choice| (choice.token(), choice.logprobs.take()));
            let (token, logprobs) = device.or_else(|| drawn.take()).unwrap_or_else(|| self.draw_row(id, row));
            let token = token?;
            self.take_token(id, token, now);
            self.advance(id, if chosen == 0 { work.rows - drafts.chain() } else { 1 });
            if chosen > 0 {
                self.request_metrics(id).accepted_tokens += 1;
                self.counters.accepted_tokens += 1;
                self.request_metrics(id).branch_tokens += u64::from(path > 0);
                self.counters.branch_tokens += u64::from(path > 0);
            }
            chosen += 1;
            self.append(id, token, logprobs, now);
            if drafts.chain() == 0 {
                break;
            }
            tokens.push(token);
            let trusted = planted(Bug::DraftsAreTrusted) && chosen <= drafts.chain();
            let followed = drafts.follow(&tokens).or(trusted.then_some(path));
            let Some(next) = followed.filter(|_| self.sequences.contains_key(&id)) else { break };
            if next != path {
                self.follow_branch(id, next - 1);
                path = next;
            }
        }
        self.trim_pages(id);
        if let Some(before) = before {
            let each = now.saturating_sub(before).as_secs_f64() / chosen as f64;
            (0..chosen).for_each(|_| self.counters.histograms.inter_token_latency.add(each));
        }
        Ok(())
    }

    fn count_drafts(&mut self, id: RequestId, drafts: usize) {
        let metrics = &mut self.requests.get_mut(&id).expect("a sequence has a request").metrics;
        metrics.drafted_tokens += drafts as u64;
        metrics.decode_steps += 1;
        self.counters.drafted_tokens += drafts as u64;
        self.counters.decode_steps += 1;
    }

    fn request_metrics(&mut self, id: SequenceId) -> &mut RequestMetrics {
        &mut self.requests.get_mut(&id.request).expect("a sequence has a request").metrics
    }

    /// Counts rows as computed.
    fn advance(&mut self, id: SequenceId, rows: usize) {
        self.sequence(id).computed += rows;
        self.fairness.charge(&self.requests[&id.request].options.user, rows);
        self.seal_pages(id);
    }

    fn sequence(&mut self, id: SequenceId) -> &mut crate::sequence::Sequence {
        self.sequences.get_mut(&id).expect("a committed sequence exists")
    }

    fn deliver_prompt_rows(&mut self, id: SequenceId, logits: &[f32]) -> Result<(), SampleError> {
        if logits.is_empty() {
            return Ok(());
        }
        let drawn = self.drawn.prompts.remove(&id);
        let told = drawn.unwrap_or_else(|| self.prompt_logprobs(id, logits));
        let request = &self.requests[&id.request];
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        sequence.delivered += logits.len() / self.config.vocabulary;
        let kind = match &request.kind {
            RequestKind::Logits => {
                sequence.blocked =
                    sequence.delivered < request.prompt.len() && !planted(Bug::BlockedConsumerIsOverrun);
                EventKind::Logits(logits.to_vec())
            }
            RequestKind::Generate(_) => {
                EventKind::PromptLogprobs(told.into_iter().collect::<Result<_, _>>()?)
            }
        };
        self.emit(id.request, kind);
        Ok(())
    }

    fn draw_row(&mut self, id: SequenceId, logits: &[f32]) -> DrawnRow {
        let mut sampler = std::mem::take(&mut self.sampler);
        let drawn = self.row_of(id, logits).expect("only Generate rows are sampled").draw(&mut sampler);
        self.sampler = sampler;
        drawn
    }

    fn prompt_logprobs(&mut self, id: SequenceId, logits: &[f32]) -> Vec<PromptLogprobs> {
        let mut sampler = std::mem::take(&mut self.sampler);
        let told = self.rows_of_prompt(id, logits).iter().map(|row| row.logprobs(&mut sampler)).collect();
        self.sampler = sampler;
        told
    }

    /// Notes a sequence's new token.
    fn take_token(&mut self, id: SequenceId, token: u32, now: Duration) {
        let request = self.requests.get_mut(&id.request).expect("a sequence has a request");
        let sequence = self.sequences.get_mut(&id).expect("a committed sequence exists");
        if request.params().is_some_and(SamplingParams::has_penalties) {
            *sequence.history.output.entry(token).or_default() += 1;
        }
        sequence.tokens.output.push(token);
        if let Some(changes) = &mut sequence.changes {
            changes.count(token);
            let generated = sequence.tokens.output.len();
            if !changes.holds(request.banned(generated)) {
                sequence.changes = Changes::new(request, &sequence.history, generated);
            }
        }
        sequence.first_token.get_or_insert(now);
        sequence.last_token = now;
        request.metrics.generated_tokens += 1;
        self.counters.generated_tokens += 1;
        if request.metrics.first_token.is_none() {
            request.metrics.first_token = Some(now);
            let waited = now.saturating_sub(request.metrics.arrival);
            self.counters.histograms.time_to_first_token.add(waited.as_secs_f64());
            self.trace(id.request, TraceKind::FirstToken, now);
        }
    }

    /// Reports the new token, starts the request's other completions after their first, and ends the completion if it is time.
    fn append(&mut self, id: SequenceId, token: u32, logprobs: Option<Vec<TokenLogprob>>, now: Duration) {
        self.spawn_others(id.request, now);
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
        self.emit(id.request, EventKind::Token { index: id.index, token, text: step.text, logprobs });
        if let Some(finish) = finish {
            self.finish_text(id, finish, now);
        }
    }

    fn spawn_others(&mut self, id: RequestId, now: Duration) {
        let request = self.requests.get_mut(&id).expect("a sequence has a request");
        if !std::mem::replace(&mut request.spawned, true) {
            let all = if planted(Bug::CompletionsAreNotSpawned) { 1 } else { request.ended.len() };
            for index in 1..all as u32 {
                self.spawn(SequenceId { request: id, index }, now);
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

    /// Text that is held back while a character or a stop string may be incomplete.
    pub(crate) fn held_text(&mut self, id: SequenceId) -> String {
        let detokenize = self.requests[&id.request].params().is_some_and(|params| params.detokenize);
        let text = self.sequences.get_mut(&id).and_then(|sequence| sequence.text.as_mut());
        text.filter(|_| detokenize).map(|text| text.finish().text).unwrap_or_default()
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
