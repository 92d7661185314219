//! Prompt lookup (Saxena, 2023): what followed the last tokens when they stood in the text before.

use crate::sequence::Tokens;

/// Earlier occurrences of each length that a tree is made of at most: beyond them nothing new is to be expected, and looking takes time.
const MOST_OCCURRENCES: usize = 8;

/// What followed the longest earlier occurrence of the last `least..=most` tokens, the latest among equals; at most `limit` tokens.
pub(crate) fn lookup(tokens: &Tokens, least: usize, most: usize, limit: usize) -> Vec<u32> {
    let mut best = (0, 0);
    for (length, end) in occurrences(tokens, least, most) {
        if length > best.0 {
            best = (length, end);
            if length == most {
                break;
            }
        }
    }
    if best.0 > 0 { continuation(tokens, best.1, limit) } else { Vec::new() }
}

/// The same, and after it what followed other occurrences, longer ones first, later ones first among equals: at most `limit` tokens each,
/// and together no more than `nodes` where tokens that begin alike count once.
pub(crate) fn lookup_tree(
    tokens: &Tokens,
    least: usize,
    most: usize,
    limit: usize,
    nodes: usize,
) -> Vec<Vec<u32>> {
    let mut ends = vec![Vec::new(); most + 1];
    for (length, end) in occurrences(tokens, least, most) {
        if ends[length].len() < MOST_OCCURRENCES {
            ends[length].push(end);
        } else if length == most {
            break;
        }
    }
    let mut paths = Vec::<Vec<u32>>::new();
    let mut left = nodes;
    for end in ends.into_iter().rev().flatten() {
        let mut path = continuation(tokens, end, limit);
        let shared = paths.iter().map(|other| common(other, &path)).max().unwrap_or(0);
        path.truncate(shared + left);
        if path.len() > shared {
            left -= path.len() - shared;
            paths.push(path);
        }
    }
    paths
}

/// Leading tokens that two texts have in common.
pub(crate) fn common(one: &[u32], other: &[u32]) -> usize {
    one.iter().zip(other).take_while(|(one, other)| one == other).count()
}

/// Earlier occurrences of the last `least..=most` tokens as (how many tokens match, where they end), the latest first.
fn occurrences(tokens: &Tokens, least: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    let len = tokens.len();
    let matching = move |end: usize| {
        (0..most.min(end)).take_while(|&back| tokens.at(end - 1 - back) == tokens.at(len - 1 - back)).count()
    };
    // `end` is where an earlier occurrence ends: at least one token follows it.
    (least..len).rev().map(move |end| (matching(end), end)).filter(move |&(length, _)| length >= least)
}

/// What followed: it may run into the end of the text, which is then taken to repeat itself.
fn continuation(tokens: &Tokens, end: usize, limit: usize) -> Vec<u32> {
    let len = tokens.len();
    let mut drafts = Vec::with_capacity(limit);
    for place in end..end + limit {
        drafts.push(if place < len { tokens.at(place) } else { drafts[place - len] });
    }
    drafts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(prompt: &[u32], output: &[u32]) -> Tokens {
        Tokens { prompt: prompt.into(), output: output.to_vec() }
    }

    fn drafts(prompt: &[u32], output: &[u32], least: usize, most: usize, limit: usize) -> Vec<u32> {
        let tokens = text(prompt, output);
        let chain = lookup(&tokens, least, most, limit);
        let tree = lookup_tree(&tokens, least, most, limit, 3 * limit);
        assert_eq!(tree.first().cloned().unwrap_or_default(), chain, "a tree begins with the chain");
        chain
    }

    #[test]
    fn lookup_continues_the_longest_then_latest_occurrence() {
        assert_eq!(drafts(&[1, 2, 3, 4, 9, 2, 3], &[], 1, 3, 2), [4, 9]);
        assert_eq!(drafts(&[1, 2, 3, 4, 7, 3, 5], &[2, 3], 1, 3, 4), [4, 7, 3, 5], "two tokens beat one");
        assert_eq!(drafts(&[3, 4, 3, 5], &[3], 1, 3, 4), [5, 3, 5, 3], "the latest among equals");
        assert_eq!(drafts(&[1, 2, 3], &[4], 1, 3, 4), []);
        assert_eq!(drafts(&[3, 4, 3], &[], 2, 3, 4), [], "one token is too few");
        assert_eq!(drafts(&[5, 6, 5, 6, 5], &[], 1, 2, 5), [6, 5, 6, 5, 6], "what repeats goes on repeating");
        assert_eq!(drafts(&[1], &[], 1, 3, 4), []);
    }

    #[test]
    fn a_tree_has_other_continuations_too() {
        let tree = |prompt: &[u32], limit, nodes| lookup_tree(&text(prompt, &[]), 1, 2, limit, nodes);
        let prompt = [1, 2, 7, 8, 1, 2, 9, 8, 2, 5, 6, 1, 2];
        assert_eq!(tree(&prompt, 2, 9), [[9, 8], [7, 8], [5, 6]], "latest first, then shorter matches");
        assert_eq!(tree(&prompt, 2, 5), [vec![9, 8], vec![7, 8], vec![5]], "no more nodes");
        assert_eq!(tree(&prompt, 2, 2), [[9, 8]], "a chain");
        // Of what begins alike, only the rest counts: the second one has one token of its own.
        assert_eq!(tree(&[1, 2, 7, 8, 1, 2, 7, 9, 1, 2], 2, 3), [[7, 9], [7, 8]]);
        assert_eq!(tree(&[4, 4, 4, 4], 3, 9), [[4, 4, 4]], "nothing twice");
    }
}
