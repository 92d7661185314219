//! AMX: a matrix unit with eight registers of 16 lines of 64 bytes. Stable Rust knows neither its instructions nor its
//! presence, so both are assembly here. Registers: tmm0 to tmm3 hold sums, tmm4 and tmm5 input, tmm6 and tmm7 weights.
//!
//! No state of the unit is kept from one block of assembly to the next, but for the configuration; compiled code never touches it.

use super::tiles::{LINE, TILE_ROWS, TileShape, TileSums};
use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// Whether the processor has tiles with bytes and bfloat16, and the system lets this process use them. Asking is what makes it
/// allow it, so this asks once.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| is_present() && is_enabled() && is_permitted())
}

/// Whether the processor has AMX-TILE, AMX-INT8 and AMX-BF16.
fn is_present() -> bool {
    const FEATURES: u32 = 1 << 24 | 1 << 25 | 1 << 22;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & FEATURES == FEATURES
}

/// Whether the system saves the registers when it switches threads.
fn is_enabled() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const TILES: u32 = 1 << 17 | 1 << 18; // configuration and data
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let low: u32;
    // SAFETY: the instruction exists, as OSXSAVE says, and only reads.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    low & TILES == TILES
}

/// Asks the system for this process's permission, which its threads and children have then too.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    line_bytes: [u16; 16],
    lines: [u8; 16],
}

/// Configures this thread's tile registers.
///
/// # Safety
/// AMX is available.
pub(super) unsafe fn configure(shape: TileShape) {
    let mut configuration =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], line_bytes: [0; 16], lines: [0; 16] };
    for register in 0..8 {
        let (bytes, lines) = match register {
            0..4 => (LINE, shape.rows),
            4..6 => (shape.bytes, shape.rows),
            _ => (LINE, shape.bytes / 4),
        };
        (configuration.line_bytes[register], configuration.lines[register]) = (bytes as u16, lines as u8);
    }
    // SAFETY: the caller's promise; the instruction reads 64 bytes.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly, preserves_flags))
    };
}

/// Gives the registers back: other code finds them as they are at a thread's start, and switching threads saves nothing.
///
/// # Safety
/// AMX is available.
pub(super) unsafe fn release() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
}

/// [`Simd::multiply_bytes`](super::Simd::multiply_bytes).
///
/// # Safety
/// As there, and AMX is available.
#[inline(always)]
pub(super) unsafe fn multiply_bytes<const T: usize>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    steps: usize,
    sums: &mut [[TileSums<i32>; T]; 2],
) {
    let sums = sums.as_mut_ptr().cast::<u8>();
    // SAFETY: the caller's promise.
    unsafe {
        match T {
            1 => bytes_one_by_two(shape, input[0], weights, steps, sums),
            2 => bytes_two_by_two(shape, [input[0], input[T - 1]], weights, steps, sums),
            _ => unreachable!("one tile of input or two"),
        }
    }
}

/// One tile of input by two panels.
///
/// # Safety
/// As for [`multiply_bytes`].
#[inline(always)]
unsafe fn bytes_one_by_two(
    shape: TileShape,
    input: *const u8,
    weights: [*const u8; 2],
    steps: usize,
    sums: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{input} + {stride}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {line}*1]",
            "tdpbssd tmm1, tmm4, tmm7",
            "add {input}, {step}",
            "add {first}, {step}",
            "add {second}, {step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            input = inout(reg) input => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums,
            line = in(reg) LINE,
            stride = in(reg) shape.bytes,
            step = in(reg) shape.rows * shape.bytes,
            options(nostack)
        );
    }
}

/// Two tiles of input by two panels: four products for four tiles read.
///
/// # Safety
/// As for [`multiply_bytes`].
#[inline(always)]
unsafe fn bytes_two_by_two(
    shape: TileShape,
    input: [*const u8; 2],
    weights: [*const u8; 2],
    steps: usize,
    sums: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tileloadd tmm4, [{upper} + {stride}*1]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {stride}*1]",
            "tdpbssd tmm1, tmm5, tmm6",
            "tileloadd tmm7, [{second} + {line}*1]",
            "tdpbssd tmm2, tmm4, tmm7",
            "tdpbssd tmm3, tmm5, tmm7",
            "add {upper}, {step}",
            "add {lower}, {step}",
            "add {first}, {step}",
            "add {second}, {step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            "tilestored [{sums} + {line}*1 + 3072], tmm3",
            upper = inout(reg) input[0] => _,
            lower = inout(reg) input[1] => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums,
            line = in(reg) LINE,
            stride = in(reg) shape.bytes,
            step = in(reg) shape.rows * shape.bytes,
            options(nostack)
        );
    }
}

/// [`Simd::multiply_bf16`](super::Simd::multiply_bf16).
///
/// # Safety
/// As there, and AMX is available.
#[inline(always)]
pub(super) unsafe fn multiply_bf16<const T: usize>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    groups: usize,
    sums: &mut [[TileSums<f32>; T]; 2],
) {
    let sums = sums.as_mut_ptr().cast::<u8>();
    // SAFETY: the caller's promise.
    unsafe {
        match T {
            1 => one_by_two(shape, input[0], weights, groups, sums),
            2 => two_by_two(shape, [input[0], input[T - 1]], weights, groups, sums),
            _ => unreachable!("one tile of input or two"),
        }
    }
}

/// Asks for the lines of a kilobyte, 4 KB after a register's address.
macro_rules! ahead {
    ($register:literal) => {
        ahead!($register, 0 64 128 192 256 320 384 448 512 576 640 704 768 832 896 960)
    };
    ($register:literal, $($line:literal)*) => {
        concat!($("prefetcht0 [{", $register, "} + 4096 + ", $line, "]\n"),*)
    };
}

/// One tile of input by two panels: for few rows, when weights come from memory.
///
/// # Safety
/// As for [`multiply_bf16`].
unsafe fn one_by_two(
    shape: TileShape,
    input: *const u8,
    weights: [*const u8; 2],
    groups: usize,
    sums: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm0, [{sums} + {line}*1]",
            "tileloadd tmm1, [{sums} + {line}*1 + 1024]",
            "2:",
            ahead!("first"),
            ahead!("second"),
            "tileloadd tmm4, [{input} + {line}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {line}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {input}, {step}",
            "add {first}, 1024",
            "add {second}, 1024",
            "dec {groups}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            input = inout(reg) input => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            groups = inout(reg) groups => _,
            step = in(reg) shape.rows * LINE,
            line = in(reg) LINE,
            sums = in(reg) sums,
            options(nostack)
        );
    }
}

/// Two tiles of input by two panels: four products for four tiles read.
///
/// # Safety
/// As for [`multiply_bf16`].
unsafe fn two_by_two(
    shape: TileShape,
    input: [*const u8; 2],
    weights: [*const u8; 2],
    groups: usize,
    sums: *mut u8,
) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "tileloadd tmm0, [{sums} + {line}*1]",
            "tileloadd tmm1, [{sums} + {line}*1 + 1024]",
            "tileloadd tmm2, [{sums} + {line}*1 + 2048]",
            "tileloadd tmm3, [{sums} + {line}*1 + 3072]",
            "2:",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tileloadd tmm4, [{upper} + {line}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {line}*1]",
            "tdpbf16ps tmm1, tmm5, tmm6",
            "tileloadd tmm7, [{second} + {line}*1]",
            "tdpbf16ps tmm2, tmm4, tmm7",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {upper}, {step}",
            "add {lower}, {step}",
            "add {first}, 1024",
            "add {second}, 1024",
            "dec {groups}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            "tilestored [{sums} + {line}*1 + 3072], tmm3",
            upper = inout(reg) input[0] => _,
            lower = inout(reg) input[1] => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            groups = inout(reg) groups => _,
            step = in(reg) shape.rows * LINE,
            line = in(reg) LINE,
            sums = in(reg) sums,
            options(nostack)
        );
    }
}

const _: () = assert!(size_of::<TileSums<f32>>() == TILE_ROWS * LINE);
const _: () = assert!(size_of::<Configuration>() == 64);
