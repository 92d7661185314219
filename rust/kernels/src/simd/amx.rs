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

/// What a loop over tiles reads and writes: each pointer and how far it goes with a step.
struct Walk<const T: usize> {
    input: [*const u8; T],
    /// Bytes of a line of input.
    stride: usize,
    input_step: usize,
    weights: [*const u8; 2],
    weight_step: usize,
    /// At least 1.
    steps: usize,
    /// (2 panels, T).
    sums: *mut u8,
}

/// Sums that begin as zeros.
macro_rules! zeros {
    ($($register:literal)*) => { concat!($("tilezero tmm", $register, "\n"),*) };
}

/// Sums that go on from what memory holds.
macro_rules! kept {
    ($($register:literal)*) => { concat!($("tileloadd tmm", $register, ", [{sums} + {line}*1 + 1024*", $register, "]\n"),*) };
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

/// One tile of input by two panels; `first` and `second` are the instructions that multiply with them.
macro_rules! one_by_two {
    ($walk:expr, $begin:expr, $ahead:expr, $first:literal, $second:literal) => {{
        let Walk { input, stride, input_step, weights, weight_step, steps, sums } = $walk;
        asm!(
            $begin,
            "2:",
            $ahead,
            "tileloadd tmm4, [{input} + {stride}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            concat!($first, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{second} + {line}*1]",
            concat!($second, " tmm1, tmm4, tmm7"),
            "add {input}, {input_step}",
            "add {first}, {weight_step}",
            "add {second}, {weight_step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            input = inout(reg) input[0] => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums,
            line = in(reg) LINE,
            stride = in(reg) stride,
            input_step = in(reg) input_step,
            weight_step = in(reg) weight_step,
            options(nostack)
        )
    }};
}

/// Two tiles of input by two panels: four products for four tiles read.
macro_rules! two_by_two {
    ($walk:expr, $begin:expr, $first:literal, $second:literal) => {{
        let Walk { input, stride, input_step, weights, weight_step, steps, sums } = $walk;
        asm!(
            $begin,
            "2:",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tileloadd tmm4, [{upper} + {stride}*1]",
            concat!($first, " tmm0, tmm4, tmm6"),
            "tileloadd tmm5, [{lower} + {stride}*1]",
            concat!($first, " tmm1, tmm5, tmm6"),
            "tileloadd tmm7, [{second} + {line}*1]",
            concat!($second, " tmm2, tmm4, tmm7"),
            concat!($second, " tmm3, tmm5, tmm7"),
            "add {upper}, {input_step}",
            "add {lower}, {input_step}",
            "add {first}, {weight_step}",
            "add {second}, {weight_step}",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            "tilestored [{sums} + {line}*1 + 3072], tmm3",
            upper = inout(reg) input[0] => _,
            lower = inout(reg) input[T - 1] => _,
            first = inout(reg) weights[0] => _,
            second = inout(reg) weights[1] => _,
            steps = inout(reg) steps => _,
            sums = in(reg) sums,
            line = in(reg) LINE,
            stride = in(reg) stride,
            input_step = in(reg) input_step,
            weight_step = in(reg) weight_step,
            options(nostack)
        )
    }};
}

/// [`Simd::multiply_bytes`](super::Simd::multiply_bytes).
///
/// # Safety
/// As there, and AMX is available.
#[inline(always)]
pub(super) unsafe fn multiply_bytes<const T: usize, const UNSIGNED: bool>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    steps: usize,
    sums: &mut [[TileSums<i32>; T]; 2],
) {
    let sums = sums.as_mut_ptr().cast::<u8>();
    let (input_step, weight_step) = (shape.rows * shape.bytes, TILE_ROWS * shape.bytes);
    let walk = Walk { input, stride: shape.bytes, input_step, weights, weight_step, steps, sums };
    // SAFETY: the caller's promise.
    unsafe {
        match (T, UNSIGNED) {
            (1, false) => one_by_two!(walk, zeros!(0 1), "", "tdpbssd", "tdpbssd"),
            (1, true) => one_by_two!(walk, zeros!(0 1), "", "tdpbsud", "tdpbssd"),
            (2, false) => two_by_two!(walk, zeros!(0 1 2 3), "tdpbssd", "tdpbssd"),
            (2, true) => two_by_two!(walk, zeros!(0 1 2 3), "tdpbsud", "tdpbssd"),
            _ => unreachable!("one tile of input or two"),
        }
    }
}

/// [`Simd::multiply_bf16`](super::Simd::multiply_bf16). One tile of input asks for weights ahead: they come from memory.
///
/// # Safety
/// As there, and AMX is available.
#[inline(always)]
pub(super) unsafe fn multiply_bf16<const T: usize>(
    shape: TileShape,
    input: [*const u8; T],
    weights: [*const u8; 2],
    steps: usize,
    sums: &mut [[TileSums<f32>; T]; 2],
) {
    let sums = sums.as_mut_ptr().cast::<u8>();
    let (input_step, weight_step) = (shape.rows * LINE, TILE_ROWS * LINE);
    let walk = Walk { input, stride: LINE, input_step, weights, weight_step, steps, sums };
    // SAFETY: the caller's promise.
    unsafe {
        match T {
            1 => one_by_two!(
                walk,
                kept!(0 1),
                concat!(ahead!("first"), ahead!("second")),
                "tdpbf16ps",
                "tdpbf16ps"
            ),
            2 => two_by_two!(walk, kept!(0 1 2 3), "tdpbf16ps", "tdpbf16ps"),
            _ => unreachable!("one tile of input or two"),
        }
    }
}

const _: () = assert!(size_of::<TileSums<f32>>() == TILE_ROWS * LINE);
const _: () = assert!(size_of::<Configuration>() == 64);
