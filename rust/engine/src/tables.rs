//! Which pages hold a sequence's keys and values.

/// A place in a page table whose page the sequence no longer needs.
pub(crate) const NO_PAGE: u32 = u32::MAX;

/// A page of a sequence on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRef {
    /// Its number in the layers that see everything (in all layers, where there are no others).
    pub page: u32,
    /// Its number in the layers that see only a window; none without such layers, or where it lies before the window.
    pub local: Option<u32>,
}

impl PageRef {
    /// From entries of page tables.
    pub(crate) fn new(page: u32, local: u32) -> Self {
        Self { page, local: Some(local).filter(|&local| local != NO_PAGE) }
    }

    /// The entry of the local page table.
    pub(crate) fn local_entry(self) -> u32 {
        self.local.unwrap_or(NO_PAGE)
    }
}

/// Where a sequence's keys and values lie: a page for every `page_tokens` positions, in the layers that see everything and in those that
/// see only a window.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PageTables {
    /// [`NO_PAGE`] before the window, where every layer has one.
    pub pages: Vec<u32>,
    /// As long as `pages`, [`NO_PAGE`] before the window; empty without such layers.
    pub locals: Vec<u32>,
}

impl PageTables {
    /// The page at a place.
    pub fn at(&self, place: usize) -> PageRef {
        PageRef::new(self.pages[place], self.locals.get(place).copied().unwrap_or(NO_PAGE))
    }

    /// Puts another page at a place.
    pub fn set(&mut self, place: usize, page: PageRef) {
        self.pages[place] = page.page;
        if let Some(local) = self.locals.get_mut(place) {
            *local = page.local_entry();
        }
    }

    /// Pages in the tables.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Whether any page is held.
    pub fn holds_any(&self) -> bool {
        self.pages.iter().any(|&page| page != NO_PAGE)
    }
}
