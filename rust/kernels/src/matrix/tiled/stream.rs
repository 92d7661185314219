//! Spans of panels times a tile or two, when weights come from memory and each of them is multiplied once or twice: reading them takes
//! vectors longer than multiplying takes the unit.
//!
//! So both work at once: while the unit multiplies a span, vectors read the next one and add the one before. In the order of the program
//! they are three spans apart; a processor that finds instructions ahead does the rest, and nobody waits for what was just stored.

use super::super::Output;
use super::super::ahead::AHEAD;
use super::spans::{Kind, Multiply};
use super::{Block, BlockKernel, parts};
use crate::simd::{Simd, TileSums};
use std::ops::Range;

impl<S: Simd, K: Kind> Multiply<'_, S, K> {
    /// Some panels times all of the `T` tiles.
    #[inline(always)]
    pub(super) fn stream<const T: usize>(&mut self, simd: S, output: &Output<'_>, panels: Range<usize>) {
        let tiles: [_; T] = std::array::from_fn(|t| self.input.tile(t));
        let groups = self.weight.groups();
        let mut spans = parts(panels, Self::PANELS).flat_map(|panels| {
            parts(0..groups, K::SPAN).map(move |groups| Block { panels: panels.clone(), groups })
        });
        let mut sums = [TileSums::default(); 4];
        let (mut read, mut multiplied) = (None, None);
        for turn in 0.. {
            let (now, before) = (turn % 2, (turn + 1) % 2);
            let next = spans.next();
            if let Some(next) = &next {
                self.fetch_scales(simd, next);
                self.read(simd, next, now * K::SPAN, true);
            }
            if let Some(read) = &read {
                self.multiply_span(read, before * K::SPAN, &tiles, before);
            }
            if let Some(multiplied) = &multiplied {
                self.read_units(simd, multiplied);
                self.add_span(simd, multiplied, 0, &tiles, now, &mut sums);
                if multiplied.groups.end == groups {
                    self.write(simd, output, &multiplied.panels, &sums);
                    sums = [TileSums::default(); 4];
                }
            }
            if next.is_none() && read.is_none() {
                break;
            }
            (multiplied, read) = (read, next);
        }
    }

    /// Asks for scales as far after a span's as weights are asked for.
    #[inline(always)]
    fn fetch_scales(&self, simd: S, span: &Block) {
        for panel in span.panels.clone() {
            let scales = self.weight.scale_bytes(panel);
            let share = scales.len() / self.weight.groups();
            let ahead = AHEAD / self.weight.layout().group_bytes();
            let later = scales.as_ptr().wrapping_add((span.groups.start + ahead) * share);
            for line in 0..(span.groups.len() * share).div_ceil(64) {
                simd.prefetch(later.wrapping_add(line * 64));
            }
        }
    }

    /// Writes complete sums.
    #[inline(always)]
    fn write(&self, simd: S, output: &Output<'_>, panels: &Range<usize>, sums: &[TileSums<f32>]) {
        let tiles = self.input.tiles;
        for panel in panels.clone() {
            for tile in 0..tiles.count() {
                let sums = &sums[Self::at(panel - panels.start, tile, tiles.count())];
                for row in 0..tiles.rows(tile) {
                    let sum = self.finish(simd, panel, simd.load(&sums.0[row]));
                    output.store_row(simd, panel, tiles.first(tile) + row, sum, output.bias);
                }
            }
        }
    }
}
