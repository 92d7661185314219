//! Lookup by name in a list that keeps the file's order.

/// Positions of a list, sorted by name: finds in logarithmic time without holding any name twice.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct NameIndex(Vec<usize>);

impl NameIndex {
    /// Sorts the positions `0..count`; a name that occurs twice is the error.
    pub(crate) fn new<'a>(count: usize, name: impl Fn(usize) -> &'a str) -> Result<Self, &'a str> {
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_unstable_by_key(|&position| name(position));
        for (&left, &right) in order.iter().zip(order.iter().skip(1)) {
            if name(left) == name(right) {
                return Err(name(left));
            }
        }
        Ok(NameIndex(order))
    }

    /// The position of `wanted` in the list that the index was made for.
    pub(crate) fn find<'a>(&self, wanted: &str, name: impl Fn(usize) -> &'a str) -> Option<usize> {
        let found = self.0.binary_search_by(|&position| name(position).cmp(wanted)).ok()?;
        self.0.get(found).copied()
    }
}
