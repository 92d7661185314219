//! The check of a value that a template assigns.

use std::cell::Cell;
use std::time::{Duration, Instant};

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::{guards, printing};

/// Deepest nesting of a value that a template assigns; messages have at most half of it.
const MAX_DEPTH: usize = 200;
/// Most items of a value, those of its items included.
const MAX_ITEMS: usize = 1 << 20;
/// Most text in a value, in bytes.
const MAX_BYTES: usize = printing::MAX_BYTES;
/// Items that are looked at for a step.
const ITEMS_PER_STEP: usize = 64;
/// Longest time that a rendering takes.
const MAX_TIME: Duration = Duration::from_secs(30);

thread_local! {
    /// When the rendering of this thread has to be done.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Begins the time of a rendering on this thread.
pub(super) fn start_clock() {
    DEADLINE.set(Instant::now().checked_add(MAX_TIME));
}

/// Ends a rendering that takes too long.
pub(super) fn check_clock() -> Result<(), Error> {
    if DEADLINE.get().is_some_and(|end| Instant::now() >= end) {
        return Err(refusal(format!("it took longer than {} seconds", MAX_TIME.as_secs())));
    }
    Ok(())
}

pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter(guards::FACTOR, factor);
    environment
        .add_filter(guards::VARIABLE, |state: &State<'_, '_>, value: Value| checked(state, value, false));
    environment
        .add_filter(guards::ATTRIBUTE, |state: &State<'_, '_>, value: Value| checked(state, value, true));
}

/// A factor of a product: a list may stand for any number of items that minijinja prints and compares without counting.
fn factor(value: Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => Err(refusal("a list cannot be multiplied".to_owned())),
        _ => Ok(value),
    }
}

/// The value, with lists in place of what would be computed again for each use, which could be nested without end, too.
fn checked(state: &State<'_, '_>, value: Value, is_part: bool) -> Result<Value, Error> {
    check_clock()?;
    let mut check = Check { items: 0, bytes: 0 };
    let changed = check.value(&value, usize::from(is_part))?;
    state.consume_fuel((check.items / ITEMS_PER_STEP) as u64)?;
    Ok(changed.unwrap_or(value))
}

fn refusal(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

struct Check {
    items: usize,
    bytes: usize,
}

impl Check {
    /// What the value becomes; none if it stays. Only a variable, at depth zero, may be a namespace.
    fn value(&mut self, value: &Value, depth: usize) -> Result<Option<Value>, Error> {
        self.count(1, value.as_str().map_or(0, str::len))?;
        let kind = value.kind();
        if !matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            return Ok(None);
        }
        let type_name = value.as_object().map_or("", |object| object.type_name());
        if depth > MAX_DEPTH {
            return Err(refusal(format!("a value is nested more than {MAX_DEPTH} levels deep")));
        }
        if depth > 0 && type_name.ends_with("Namespace") {
            return Err(refusal("a namespace cannot be part of another value".to_owned()));
        }
        match kind {
            ValueKind::Map => self.map(value, depth, type_name.ends_with("MergeDict")),
            _ => self.list(value, depth),
        }
    }

    fn count(&mut self, items: usize, bytes: usize) -> Result<(), Error> {
        self.items = self.items.saturating_add(items);
        self.bytes = self.bytes.saturating_add(bytes);
        if self.items > MAX_ITEMS {
            return Err(refusal(format!(
                "a value has more than {MAX_ITEMS} items, those of its items included"
            )));
        }
        if self.bytes > MAX_BYTES {
            return Err(refusal(format!("a value has more than {MAX_BYTES} bytes of text")));
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<Option<Value>, Error> {
        let mut changed = value.downcast_object_ref::<Vec<Value>>().is_none() && !value.is_tuple();
        let length = value.len().unwrap_or(0);
        if length > MAX_ITEMS {
            self.count(length, 0)?;
        }
        let mut items = Vec::new();
        for item in value.try_iter()? {
            let new = self.value(&item, depth + 1)?;
            changed |= new.is_some();
            items.push(new.unwrap_or(item));
        }
        let list = |items: Vec<Value>| match value.is_tuple() {
            true => Value::from(Tuple::from(items)),
            false => Value::from(items),
        };
        Ok(changed.then(|| list(items)))
    }

    fn map(&mut self, value: &Value, depth: usize, is_lazy: bool) -> Result<Option<Value>, Error> {
        let (mut pairs, mut changed) = (Vec::new(), is_lazy);
        for key in value.try_iter()? {
            self.value(&key, depth + 1)?;
            let item = value.get_item(&key)?;
            let new = self.value(&item, depth + 1)?;
            changed |= new.is_some();
            pairs.push((key, new.unwrap_or(item)));
        }
        Ok(changed.then(|| Value::from_pairs(pairs)))
    }
}
