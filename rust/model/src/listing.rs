//! A program as text, one line per step: what the snapshots in `tests/programs` hold.

use std::fmt;

use crate::Program;
use crate::step::{Slice, Step};

impl fmt::Display for Program {
    /// One line per step: what the snapshots in the tests hold.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |slice: &Slice| {
            let buffer = &self.buffers[slice.buffer];
            match slice.width == buffer.width {
                true => buffer.name.to_owned(),
                false => format!("{}[{}..{}]", buffer.name, slice.offset, slice.offset + slice.width),
            }
        };
        let matrix = |index: &usize| {
            self.matrices[*index].parts.iter().map(ToString::to_string).collect::<Vec<_>>().join("|")
        };
        for step in &self.steps {
            match step {
                Step::Embed { output, scale } => writeln!(f, "embed {} scale={scale}", name(output)),
                Step::AddPosition { rows } => writeln!(f, "add_position {}", name(rows)),
                Step::Norm { input, output, kind, groups, epsilon, weight } => writeln!(
                    f,
                    "norm {} -> {} {kind:?} groups={groups} epsilon={epsilon} {}",
                    name(input),
                    name(output),
                    self.vectors[*weight].key
                ),
                Step::Linear { input, output, weight } => {
                    writeln!(f, "linear {} -> {} {}", name(input), name(output), matrix(weight))
                }
                Step::Rope { rows, heads, rope, style } => {
                    writeln!(f, "rope {} heads={heads} rope={rope} {style:?}", name(rows))
                }
                Step::WriteKv { keys, values, layer } => {
                    writeln!(f, "write_kv {} {} layer={layer}", name(keys), name(values))
                }
                Step::Attend { queries, output, layer, window } => {
                    writeln!(
                        f,
                        "attend {} -> {} layer={layer} window={window:?}",
                        name(queries),
                        name(output)
                    )
                }
                Step::GatedActivation { gate, up, output, activation } => {
                    writeln!(f, "gated {activation:?} {} {} -> {}", name(gate), name(up), name(output))
                }
                Step::Activation { rows, activation } => {
                    writeln!(f, "activation {activation:?} {}", name(rows))
                }
                Step::Add { destination, source, scale } => {
                    writeln!(f, "add {} += {scale} * {}", name(destination), name(source))
                }
                Step::AddGated { destination, source, gate } => {
                    writeln!(f, "add_gated {} += {} gate={}", name(destination), name(source), name(gate))
                }
                Step::Route { logits, used, renormalise } => {
                    writeln!(f, "route {} used={used} renormalise={renormalise}", name(logits))
                }
                Step::Experts { input, output, gate_up, width, activation, .. } => writeln!(
                    f,
                    "experts {} -> {} count={} width={width} {activation:?}",
                    name(input),
                    name(output),
                    gate_up.len()
                ),
                Step::Select { input, output } => writeln!(f, "select {} -> {}", name(input), name(output)),
                Step::Scale { rows, scale } => writeln!(f, "scale {} {scale}", name(rows)),
                Step::Softcap { rows, cap } => writeln!(f, "softcap {} {cap}", name(rows)),
            }?;
        }
        Ok(())
    }
}
