//! Two-dimensional views of `f32` slices: rows of `width` values that begin `stride` values apart.

use crate::Pool;
use std::marker::PhantomData;

/// Rows to read.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    data: &'a [f32], // (rows, stride), the last row may end after `width`
    rows: usize,
    width: usize,
    stride: usize,
}

/// Rows to write.
#[derive(Debug)]
pub struct RowsMut<'a> {
    data: &'a mut [f32], // (rows, stride), the last row may end after `width`
    rows: usize,
    width: usize,
    stride: usize,
}

/// Rows that several threads write, each its own ones.
#[derive(Clone, Copy, Debug)]
pub struct SharedRows<'a> {
    data: *mut f32,
    rows: usize,
    width: usize,
    stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a mutable borrow of plain numbers; `row_mut` leaves it to the caller that no row is had twice.
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

fn check(len: usize, rows: usize, width: usize, stride: usize) {
    assert!(stride >= width, "stride {stride} is below the row width {width}");
    if rows > 0 {
        let needed = (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(width));
        assert!(
            needed.is_some_and(|needed| needed <= len),
            "{rows} rows of {width} values, {stride} apart, need more than the {len} values given"
        );
    }
}

impl<'a> Rows<'a> {
    /// A view of `rows` rows of `width` values that begin `stride` values apart in `data`.
    ///
    /// # Panics
    /// When `stride < width` or `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, width: usize, stride: usize) -> Rows<'a> {
        check(data.len(), rows, width, stride);
        Rows { data, rows, width, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Distance between the beginnings of two rows, in values.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `index`.
    #[inline]
    pub fn row(&self, index: usize) -> &'a [f32] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        &self.data[index * self.stride..][..self.width]
    }

    /// `width` columns of every row from column `start` on.
    ///
    /// # Panics
    /// When the columns end after the rows' width.
    pub fn columns(&self, start: usize, width: usize) -> Rows<'a> {
        assert!(
            start <= self.width && width <= self.width - start,
            "columns {start}..+{width} of {}",
            self.width
        );
        Rows { data: self.data.get(start..).unwrap_or(&[]), rows: self.rows, width, stride: self.stride }
    }
}

impl<'a> RowsMut<'a> {
    /// A view of `rows` rows of `width` values that begin `stride` values apart in `data`.
    ///
    /// # Panics
    /// When `stride < width` or `data` is too short.
    pub fn new(data: &'a mut [f32], rows: usize, width: usize, stride: usize) -> RowsMut<'a> {
        check(data.len(), rows, width, stride);
        RowsMut { data, rows, width, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Distance between the beginnings of two rows, in values.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `index`.
    #[inline]
    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        &mut self.data[index * self.stride..][..self.width]
    }

    /// The same rows, to read.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows { data: self.data, rows: self.rows, width: self.width, stride: self.stride }
    }

    /// The same rows under a shorter borrow.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut { data: self.data, rows: self.rows, width: self.width, stride: self.stride }
    }

    /// `width` columns of every row from column `start` on.
    ///
    /// # Panics
    /// When the columns end after the rows' width.
    pub fn columns(self, start: usize, width: usize) -> RowsMut<'a> {
        assert!(
            start <= self.width && width <= self.width - start,
            "columns {start}..+{width} of {}",
            self.width
        );
        let data = self.data.get_mut(start..).unwrap_or(&mut []);
        RowsMut { data, rows: self.rows, width, stride: self.stride }
    }

    /// The same rows, to be written by several threads.
    pub fn share(self) -> SharedRows<'a> {
        let (rows, width, stride) = (self.rows, self.width, self.stride);
        SharedRows { data: self.data.as_mut_ptr(), rows, width, stride, borrow: PhantomData }
    }
}

impl<'a> SharedRows<'a> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Columns `start..start + width` of row `index`.
    ///
    /// # Safety
    /// No other reference to any of these values may be live.
    #[inline]
    #[allow(clippy::mut_from_ref)] // that is its purpose; the caller keeps references apart
    pub unsafe fn part_mut(&self, index: usize, start: usize, width: usize) -> &'a mut [f32] {
        assert!(index < self.rows && start <= self.width && width <= self.width - start);
        // SAFETY: within the borrow that `share` took, as just checked; the caller excludes aliases.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(index * self.stride + start), width) }
    }

    /// Row `index`.
    ///
    /// # Safety
    /// No other reference to this row may be live.
    #[inline]
    #[allow(clippy::mut_from_ref)] // see `part_mut`
    pub unsafe fn row_mut(&self, index: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { self.part_mut(index, 0, self.width) }
    }
}

/// A slice that several threads write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct SharedSlice<'a, T> {
    data: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable borrow of plain values; `part_mut` leaves it to the caller that no value is had twice.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> SharedSlice<'a, T> {
        SharedSlice { data: values.as_mut_ptr(), len: values.len(), borrow: PhantomData }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// No other reference to any of these values may be live.
    #[inline]
    #[allow(clippy::mut_from_ref)] // that is its purpose; the caller keeps references apart
    pub(crate) unsafe fn part_mut(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: within the borrow, as just checked; the caller excludes aliases.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// Calls `body(index, row)` for every row, `rows_per_task` rows to a task, over the pool.
pub fn for_each_row(
    pool: &Pool,
    rows: RowsMut<'_>,
    rows_per_task: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    let rows_per_task = rows_per_task.max(1);
    let shared = rows.share();
    pool.run(shared.rows.div_ceil(rows_per_task), |task| {
        let first = task * rows_per_task;
        for index in first..shared.rows.min(first + rows_per_task) {
            // SAFETY: tasks have disjoint row ranges, and a task holds one row at a time.
            body(index, unsafe { shared.row_mut(index) });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_rows_and_columns() {
        let mut data: Vec<f32> = (0..14).map(|i| i as f32).collect();
        let rows = Rows::new(&data, 3, 4, 5);
        assert_eq!(rows.row(2), &[10.0, 11.0, 12.0, 13.0]);
        assert_eq!(rows.columns(1, 2).row(2), &[11.0, 12.0]);
        assert_eq!(rows.columns(4, 0).row(2), &[] as &[f32]);
        let pool = Pool::new(2).unwrap();
        for_each_row(&pool, RowsMut::new(&mut data, 3, 4, 5).columns(3, 1), 1, |i, row| row[0] = -(i as f32));
        assert_eq!((data[3], data[8], data[13], data[12]), (-0.0, -1.0, -2.0, 12.0));
    }

    #[test]
    #[should_panic(expected = "need more than")]
    fn short_data_is_refused() {
        Rows::new(&[0.0; 13], 3, 4, 5);
    }
}
