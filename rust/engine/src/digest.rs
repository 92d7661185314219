//! Names of pages beyond this process: what tiers file pages under and what KV events call them.
//!
//! A digest is keyed BLAKE3 over the parent's digest and the page's own tokens; the root's covers everything that makes equal tokens give
//! other keys and values, or that must not be shared (the encoding's variant, the tenant's salt). The key is secret to the process or to
//! the folder that keeps pages, so neither a file's name nor an event tells a stranger what was asked, and nobody can prepare a
//! collision. Inside the process digests prove nothing: there pages are compared token by token (`prefix.rs`), and a page that comes
//! back from a tier carries its parent's digest and its tokens, which are compared as well.

use crate::planted::{Bug, planted};
use crate::prefix::Domain;

/// Identity of a page's contents: of all tokens up to its end.
pub type Digest = [u8; 32];

/// The digest that a domain's first pages continue.
pub(crate) fn root_digest(key: &Digest, domain: &Domain) -> Digest {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&[u8::from(domain.long_context), u8::from(domain.private_to.is_some())]);
    hasher.update(&domain.private_to.unwrap_or(0).to_le_bytes());
    // Whether there is a salt is part of the message: an empty one is a tenant too.
    hasher.update(&[u8::from(domain.salt.is_some())]);
    hasher.update(domain.salt.as_deref().unwrap_or("").as_bytes());
    hasher.finalize().into()
}

/// The digest of a page with these tokens after the page called `parent`.
pub(crate) fn page_digest(key: &Digest, parent: &Digest, tokens: &[u32]) -> Digest {
    let mut hasher = blake3::Hasher::new_keyed(key);
    if !planted(Bug::DigestIgnoresParent) {
        hasher.update(parent);
    }
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_must_differ_does() {
        let domain = |long_context, private_to, salt: Option<&str>| Domain {
            long_context,
            private_to,
            salt: salt.map(Into::into),
        };
        let domains = [
            domain(false, None, None),
            domain(true, None, None),
            domain(false, Some(0), None),
            domain(false, Some(1), None),
            domain(false, None, Some("")),
            domain(false, None, Some("a")),
        ];
        let mut seen = std::collections::HashSet::new();
        for key in [[0; 32], [1; 32]] {
            for domain in &domains {
                let root = root_digest(&key, domain);
                assert!(seen.insert(root));
                assert!(seen.insert(page_digest(&key, &root, &[1, 2])));
                assert!(seen.insert(page_digest(&key, &root, &[1])));
                assert!(seen.insert(page_digest(&key, &page_digest(&key, &root, &[1]), &[2])));
            }
        }
    }
}
