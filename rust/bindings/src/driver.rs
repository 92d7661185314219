//! The CUDA driver's few functions that a prepared step takes, and memory that the GPU copies from and to by itself. All of this crate's
//! `unsafe` is in this file.
//!
//! Python has loaded the driver already (infer/gpu/launch.py) and hands over where its functions are: so nothing is linked or searched
//! for here, a process without a GPU never loads it, and tests hand over functions of their own (tests/gpu/numpy_driver.py).
//! That the addresses, handles and device pointers are what they are said to be is `infer.gpu`'s word, as it is where that calls the same
//! functions through ctypes. Whose GPU is current is the calling thread's matter, as with every call of the driver.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::mem::{size_of_val, transmute};

use numpy::{Element, PyArrayDyn, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::error::refusal;

/// A graph that is ready to be launched, an event, or a stream, as the driver knows it.
pub type Handle = usize;

/// An address in the GPU's memory.
pub type Pointer = u64;

type CopyIn = unsafe extern "C" fn(Pointer, *const u8, usize, Handle) -> c_int;
type CopyOut = unsafe extern "C" fn(*mut u8, Pointer, usize, Handle) -> c_int;
type CopyRows = unsafe extern "C" fn(*const Columns, Handle) -> c_int;
type OnStream = unsafe extern "C" fn(Handle, Handle) -> c_int;
type Wait = unsafe extern "C" fn(Handle) -> c_int;
type NameOf = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

const HOST: c_uint = 1; // CU_MEMORYTYPE_HOST
const DEVICE: c_uint = 2; // CU_MEMORYTYPE_DEVICE

/// One side of a copy of columns.
#[repr(C)]
struct Side {
    first_byte: usize,
    first_row: usize,
    kind: c_uint,
    host: usize,
    device: Pointer,
    array: Handle,
    pitch: usize,
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
struct Columns {
    source: Side,
    target: Side,
    width: usize,
    height: usize,
}

/// The functions, and the stream on which everything is enqueued. Each call but `wait` only enqueues.
pub struct Driver {
    copy_in: CopyIn,
    copy_rows: CopyRows,
    copy_out: CopyOut,
    launch: OnStream,
    record: OnStream,
    wait: Wait,
    name: NameOf,
    stream: Handle,
}

impl Driver {
    /// From the functions' addresses by name.
    ///
    /// # Errors
    /// A function that is missing.
    pub fn new(addresses: &HashMap<String, usize>, stream: Handle) -> Result<Self, String> {
        let of = |name: &str| match addresses.get(name) {
            Some(&address) if address != 0 => Ok(address),
            _ => Err(format!("functions must have the address of {name}")),
        };
        // SAFETY: these are the addresses of the functions of these names (this file's header), whose types `cuda.h` says.
        Ok(unsafe {
            Self {
                copy_in: transmute::<usize, CopyIn>(of("cuMemcpyHtoDAsync_v2")?),
                copy_rows: transmute::<usize, CopyRows>(of("cuMemcpy2DAsync_v2")?),
                copy_out: transmute::<usize, CopyOut>(of("cuMemcpyDtoHAsync_v2")?),
                launch: transmute::<usize, OnStream>(of("cuGraphLaunch")?),
                record: transmute::<usize, OnStream>(of("cuEventRecord")?),
                wait: transmute::<usize, Wait>(of("cuEventSynchronize")?),
                name: transmute::<usize, NameOf>(of("cuGetErrorName")?),
                stream,
            }
        })
    }

    /// Enqueues a copy to the GPU. The source must be [`Pinned`], and be left as it is until the copy is done.
    pub fn upload<T: Element>(&self, target: Pointer, source: &[T]) -> Result<(), String> {
        // SAFETY: the source is as long as is said; the target is an array of the GPU's that is at least as long (this file's header).
        let status =
            unsafe { (self.copy_in)(target, source.as_ptr().cast(), size_of_val(source), self.stream) };
        self.check(status, "a copy to the GPU")
    }

    /// Enqueues a copy of the first columns of all rows, of `stride` values each, to an array with rows as long. As [`Driver::upload`].
    pub fn upload_columns(
        &self,
        target: Pointer,
        source: &[i32],
        stride: usize,
        columns: usize,
    ) -> Result<(), String> {
        let side = |kind, host, device| Side {
            first_byte: 0,
            first_row: 0,
            kind,
            host,
            device,
            array: 0,
            pitch: size_of::<i32>() * stride,
        };
        let columns = Columns {
            source: side(HOST, source.as_ptr().addr(), 0),
            target: side(DEVICE, 0, target),
            width: size_of::<i32>() * columns.min(stride),
            height: source.len() / stride.max(1),
        };
        // SAFETY: the source has that many whole rows, each as wide as is said; the target as above.
        let status = unsafe { (self.copy_rows)(&raw const columns, self.stream) };
        self.check(status, "a copy to the GPU")
    }

    /// Enqueues a copy from the GPU. The target must be [`Pinned`], and be left alone until the copy is done.
    pub fn download<T: Element>(&self, target: &mut [T], source: Pointer) -> Result<(), String> {
        let size = size_of_val(target);
        // SAFETY: the target is as long as is said; the source is an array of the GPU's that is at least as long (this file's header).
        let status = unsafe { (self.copy_out)(target.as_mut_ptr().cast(), source, size, self.stream) };
        self.check(status, "a copy from the GPU")
    }

    /// Enqueues a graph.
    pub fn launch(&self, graph: Handle) -> Result<(), String> {
        // SAFETY: a graph of this GPU, whose owner is kept beside the handle.
        self.check(unsafe { (self.launch)(graph, self.stream) }, "launching a graph")
    }

    /// Has an event tell when all that is enqueued up to here is done.
    pub fn record(&self, event: Handle) -> Result<(), String> {
        // SAFETY: an event of this GPU, whose owner is kept beside the handle.
        self.check(unsafe { (self.record)(event, self.stream) }, "marking a step's end")
    }

    /// Waits until what an event tells of is done.
    pub fn wait(&self, event: Handle) -> Result<(), String> {
        // SAFETY: as above.
        self.check(unsafe { (self.wait)(event) }, "waiting for a step")
    }

    fn check(&self, status: c_int, what: &str) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the function writes a pointer to a string that lives for ever, or none.
        let name = unsafe {
            (self.name)(status, &raw mut name);
            if name.is_null() { c"unknown error" } else { CStr::from_ptr(name) }
        };
        Err(format!("{what} failed: {} ({status})", name.to_string_lossy()))
    }
}

/// An array in host memory that the GPU copies from and to by itself; it is kept alive.
pub struct Pinned<T> {
    array: Py<PyArrayDyn<T>>,
    address: usize,
    length: usize,
}

impl<T: Element> Pinned<T> {
    /// A contiguous array.
    pub fn new(array: &Bound<'_, PyArrayDyn<T>>) -> PyResult<Self> {
        if !array.is_c_contiguous() || array.is_empty() {
            return Err(refusal("pinned arrays must be contiguous and not empty"));
        }
        Ok(Self { address: array.data().addr(), length: array.len(), array: array.clone().unbind() })
    }

    /// Its last dimension.
    pub fn stride(&self, py: Python<'_>) -> usize {
        self.array.bind(py).shape().last().copied().unwrap_or_default()
    }

    /// The values.
    pub fn values(&mut self) -> &mut [T] {
        // SAFETY: `array` keeps so many values of this type alive at this address (numpy moves no data). Nobody else looks at them
        // meanwhile: Python does so on the thread that runs steps alone, which runs this one, and the GPU's copies are over or not
        // begun, since `launcher.rs` waits for a step before its memory is another's.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, self.length) }
    }
}
