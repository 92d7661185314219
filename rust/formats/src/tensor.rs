//! Element types and tensor descriptions shared by all containers.

use std::fmt;
use std::ops::Range;

/// Makes the enum, its names, block sizes and container codes from one row per type, so that no two lists can
/// disagree. Row: variant, name, elements per block, bytes per block, ggml type id, known to safetensors.
macro_rules! tensor_types {
    ($($variant:ident $name:literal $block_len:literal $block_bytes:literal $ggml:expr, $safetensors:literal;)*) => {
        /// How the elements of a tensor are stored: all types of safetensors and of ggml.
        ///
        /// A type stores `block_len` neighbouring elements of a row in `block_bytes` bytes; plain types have
        /// blocks of one element.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum TensorType {
            $(
                #[doc = concat!("`", $name, "`: ", $block_len, " element(s) in ", $block_bytes, " byte(s).")]
                $variant,
            )*
        }

        impl TensorType {
            /// Every type, in the order of the enum.
            pub const ALL: &'static [TensorType] = &[$(TensorType::$variant),*];

            /// The name that safetensors and ggml's tools write, for example `BF16` or `Q4_K`.
            pub fn name(self) -> &'static str {
                match self { $(TensorType::$variant => $name,)* }
            }

            /// Elements in one block.
            pub fn block_len(self) -> usize {
                match self { $(TensorType::$variant => $block_len,)* }
            }

            /// Bytes of one block.
            pub fn block_bytes(self) -> usize {
                match self { $(TensorType::$variant => $block_bytes,)* }
            }

            /// The id in GGUF files (`enum ggml_type`); `None` for types that GGUF cannot hold.
            pub fn ggml_id(self) -> Option<u32> {
                match self { $(TensorType::$variant => $ggml,)* }
            }

            fn in_safetensors(self) -> bool {
                match self { $(TensorType::$variant => $safetensors,)* }
            }
        }
    };
}

tensor_types! {
    Bool "BOOL" 1 1 None, true;
    U8 "U8" 1 1 None, true;
    I8 "I8" 1 1 Some(24), true;
    U16 "U16" 1 2 None, true;
    I16 "I16" 1 2 Some(25), true;
    U32 "U32" 1 4 None, true;
    I32 "I32" 1 4 Some(26), true;
    U64 "U64" 1 8 None, true;
    I64 "I64" 1 8 Some(27), true;
    F64 "F64" 1 8 Some(28), true;
    F32 "F32" 1 4 Some(0), true;
    F16 "F16" 1 2 Some(1), true;
    Bf16 "BF16" 1 2 Some(30), true;
    C64 "C64" 1 8 None, true;
    F8E4M3 "F8_E4M3" 1 1 None, true;
    F8E5M2 "F8_E5M2" 1 1 None, true;
    F8E8M0 "F8_E8M0" 1 1 None, true;
    F8E4M3Fnuz "F8_E4M3FNUZ" 1 1 None, true;
    F8E5M2Fnuz "F8_E5M2FNUZ" 1 1 None, true;
    F6E2M3 "F6_E2M3" 4 3 None, true;
    F6E3M2 "F6_E3M2" 4 3 None, true;
    F4 "F4" 2 1 None, true;
    Q4_0 "Q4_0" 32 18 Some(2), false;
    Q4_1 "Q4_1" 32 20 Some(3), false;
    Q5_0 "Q5_0" 32 22 Some(6), false;
    Q5_1 "Q5_1" 32 24 Some(7), false;
    Q8_0 "Q8_0" 32 34 Some(8), false;
    Q8_1 "Q8_1" 32 36 Some(9), false;
    Q2K "Q2_K" 256 84 Some(10), false;
    Q3K "Q3_K" 256 110 Some(11), false;
    Q4K "Q4_K" 256 144 Some(12), false;
    Q5K "Q5_K" 256 176 Some(13), false;
    Q6K "Q6_K" 256 210 Some(14), false;
    Q8K "Q8_K" 256 292 Some(15), false;
    IQ2XXS "IQ2_XXS" 256 66 Some(16), false;
    IQ2XS "IQ2_XS" 256 74 Some(17), false;
    IQ3XXS "IQ3_XXS" 256 98 Some(18), false;
    IQ1S "IQ1_S" 256 50 Some(19), false;
    IQ4NL "IQ4_NL" 32 18 Some(20), false;
    IQ3S "IQ3_S" 256 110 Some(21), false;
    IQ2S "IQ2_S" 256 82 Some(22), false;
    IQ4XS "IQ4_XS" 256 136 Some(23), false;
    IQ1M "IQ1_M" 256 56 Some(29), false;
    TQ1_0 "TQ1_0" 256 54 Some(34), false;
    TQ2_0 "TQ2_0" 256 66 Some(35), false;
    MXFP4 "MXFP4" 32 17 Some(39), false;
    NVFP4 "NVFP4" 64 36 Some(40), false;
    Q1_0 "Q1_0" 128 18 Some(41), false;
    Q2_0 "Q2_0" 64 18 Some(42), false;
}

impl TensorType {
    /// Bytes of `elements` neighbouring elements; `None` if they do not fill whole blocks, or if the product
    /// is more than a `usize` can hold.
    pub fn byte_len(self, elements: usize) -> Option<usize> {
        let blocks = elements.checked_div(self.block_len())?;
        if blocks.checked_mul(self.block_len()) != Some(elements) {
            return None;
        }
        blocks.checked_mul(self.block_bytes())
    }

    /// The type that GGUF files call `id`.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|tensor_type| tensor_type.ggml_id() == Some(id))
    }

    /// The type that safetensors headers call `name`.
    pub fn from_safetensors_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|found| found.in_safetensors() && found.name() == name)
    }

    /// Names of all types that a safetensors header may use, for messages.
    pub(crate) fn safetensors_names() -> String {
        let names: Vec<&str> =
            Self::ALL.iter().filter(|found| found.in_safetensors()).map(|found| found.name()).collect();
        names.join(", ")
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// One tensor of a file: where it is and how to read it. Its range was proven to lie within the file, and to
/// be exactly as long as its shape and type say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// How its elements are stored.
    pub tensor_type: TensorType,
    /// Row-major: slowest dimension first, elements of a row adjacent. Empty for a scalar; never holds a
    /// zero.
    pub shape: Vec<usize>,
    /// Its bytes within the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// The product of the shape; it was proven not to overflow.
    pub fn elements(&self) -> usize {
        self.shape.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
    }

    /// The tensor's bytes, given those of the file that was parsed.
    ///
    /// `None` only if `file` is shorter than the file that was parsed.
    pub fn bytes<'a>(&self, file: &'a [u8]) -> Option<&'a [u8]> {
        file.get(self.range.clone())
    }
}

/// Product of a shape, `None` on overflow.
pub(crate) fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size))
}
