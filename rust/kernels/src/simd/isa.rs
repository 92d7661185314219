//! Which instruction sets there are, what this machine has of them, and how a kernel is run on one.

#[cfg(target_arch = "aarch64")]
use super::Neon;
#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512};
use super::{Kernel, Scalar};
use crate::KernelError;

/// An instruction set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// aarch64 with NEON, which all of them have.
    Neon,
    /// The same with DotProd.
    NeonDotprod,
    /// The same with I8MM.
    NeonI8mm,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// The same with AVX-512 BF16.
    Avx512Bf16,
    /// The same with AMX, of bytes and of bfloat16.
    Amx,
}

impl Isa {
    pub(super) const ALL: [Isa; 8] = [
        Isa::Scalar,
        Isa::Neon,
        Isa::NeonDotprod,
        Isa::NeonI8mm,
        Isa::Avx2,
        Isa::Avx512,
        Isa::Avx512Bf16,
        Isa::Amx,
    ];

    /// Its name, as in `INFER_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon_dotprod",
            Isa::NeonI8mm => "neon_i8mm",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// Whether it multiplies pairs of bfloat16 in one instruction, for which activations are rounded.
    pub(crate) fn has_bf16_dots(self) -> bool {
        self == Isa::Avx512Bf16
    }

    /// Whether it has a matrix unit: see [`MatrixUnit`](super::MatrixUnit).
    pub(crate) fn has_tiles(self) -> bool {
        self == Isa::Amx
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Neon::<0>::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => Neon::<1>::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => Neon::<2>::detect().is_some(),
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::<false, false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::<true, false>::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Avx512::<true, true>::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => false,
        }
    }

    /// Those that this machine has, the best one last.
    pub fn available() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// The best one that this machine has.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar)
    }

    /// The one that the environment variable `INFER_ISA` (a [name](Isa::name)) forces, else the best one.
    ///
    /// # Errors
    /// When the variable names no instruction set, or one that this machine lacks.
    pub fn from_env() -> Result<Isa, KernelError> {
        match std::env::var_os("INFER_ISA") {
            None => Ok(Isa::detect()),
            Some(value) => Isa::from_name(&value.to_string_lossy()),
        }
    }

    /// The one of this name, if this machine has it; the best one for an empty name.
    ///
    /// # Errors
    /// When the name is unknown, or this machine lacks the instruction set.
    pub fn from_name(name: &str) -> Result<Isa, KernelError> {
        if name.is_empty() {
            return Ok(Isa::detect());
        }
        let named = Isa::ALL.into_iter().find(|isa| isa.name() == name);
        let isa = named.ok_or_else(|| KernelError::UnknownIsa { value: name.to_owned() })?;
        if isa.is_available() {
            return Ok(isa);
        }
        let available = Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ");
        Err(KernelError::IsaUnavailable { requested: isa.name(), available })
    }

    /// Runs `kernel` compiled for this instruction set.
    ///
    /// # Panics
    /// When this machine lacks it.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Isa::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod if K::MULTIPLIES_BYTES => {
                Neon::<1>::detect().expect("DotProd is absent").enter(kernel)
            }
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm if K::MULTIPLIES_BYTES => {
                Neon::<2>::detect().expect("I8MM is absent").enter(kernel)
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => {
                Neon::<0>::detect().expect("NEON is absent").enter(kernel)
            }
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDotprod | Isa::NeonI8mm => {
                panic!("{} is absent: this is no aarch64 machine", self.name())
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().expect("AVX2, FMA and F16C are absent").enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Avx512::<false, false>::detect().expect("AVX-512 with VNNI is absent").enter(kernel)
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => Avx512::<true, false>::detect().expect("AVX-512 BF16 is absent").enter(kernel),
            // The vectors are the same; what is for its matrix unit goes to `dispatch_tiles`.
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Avx512::<true, false>::detect().expect("AVX-512 BF16 is absent").enter(kernel),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                panic!("{} is absent: this is no x86-64 machine", self.name())
            }
        }
    }

    /// Runs a kernel of matrix units, which is compiled for those instruction sets only that have one. Tests run it on every one.
    ///
    /// # Panics
    /// When this machine lacks the instruction set, or that has no matrix unit.
    #[cfg_attr(not(any(test, target_arch = "x86_64")), allow(unused_variables))]
    pub(crate) fn dispatch_tiles<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Avx512::<true, true>::detect().expect("AMX is absent").enter(kernel),
            #[cfg(test)]
            isa => isa.dispatch(kernel),
            #[cfg(not(test))]
            isa => panic!("{} has no matrix unit", isa.name()),
        }
    }
}
