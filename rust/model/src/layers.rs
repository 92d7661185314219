//! What differs between the layers of a model: windows, rotation, dense or expert feed-forward networks.

use std::collections::HashSet;

use crate::family::{Arch, ExpertsRow, Rotated, Windows};
use crate::spec::{FeedForward, LayerSpec, MAX_POSITIONS, MAX_WIDTH};
use crate::{Config, ModelError, ModelSpec};

const MAX_LAYERS: usize = 4096;
/// Of all layers together.
const MAX_EXPERTS: usize = 1 << 18;

impl ModelSpec {
    /// The widest window, if every layer has one: no later row of a sequence sees what lies before it.
    pub fn page_window(&self) -> Option<usize> {
        let widest = |widest: Option<usize>, layer: &LayerSpec| Some(widest?.max(layer.window?));
        self.layers.iter().fold(Some(0), widest).filter(|window| *window > 0)
    }

    /// The widest window of those layers that have one, if any has.
    pub fn layer_window(&self) -> Option<usize> {
        self.layers.iter().filter_map(|layer| layer.window).max()
    }

    /// The widest window, if some layers have one and others see everything: then the keys and values of both kinds can lie in pages of
    /// their own ([`crate::CpuModel::allocate_split_cache`]).
    pub fn local_window(&self) -> Option<usize> {
        self.layer_window().filter(|_| self.page_window().is_none())
    }
}

/// Reads all layers of a model with so many kinds of rotation.
pub(crate) fn read(
    arch: &Arch,
    config: &Config,
    hidden: usize,
    ropes: usize,
) -> Result<Vec<LayerSpec>, ModelError> {
    let count = config.size(&["num_hidden_layers", "n_layer"], MAX_LAYERS)?;
    let experts = config.count(&["num_experts", "num_local_experts"], MAX_EXPERTS)?.unwrap_or(0);
    if arch.experts.is_some() && count * experts > MAX_EXPERTS {
        return Err(ModelError::config(
            "num_experts",
            experts,
            format!("at most {MAX_EXPERTS} in all layers"),
        ));
    }
    let windows = windows(arch, config, count)?;
    let marked = config.numbers("no_rope_layers")?;
    let sparse = SparseLayers::read(config)?;
    let interval = config.count(&["no_rope_layer_interval"], MAX_LAYERS)?.unwrap_or(4).max(1);
    (0..count)
        .map(|layer| {
            let window = windows[layer];
            let rotated = match arch.rotated {
                Rotated::All => true,
                Rotated::Windowed => window.is_some(),
                Rotated::Marked => match &marked {
                    Some(marked) => marked.get(layer).is_none_or(|mark| *mark != 0.0),
                    None => !(layer + 1).is_multiple_of(interval),
                },
            };
            let rope = if window.is_some() { ropes.min(2) } else { 1 };
            Ok(LayerSpec {
                window,
                rope: (rotated && ropes > 0).then(|| rope - 1),
                feed_forward: feed_forward(arch, config, hidden, sparse.contains(layer))?,
            })
        })
        .collect()
}

fn windows(arch: &Arch, config: &Config, layers: usize) -> Result<Vec<Option<usize>>, ModelError> {
    let stated = stated_windows(config, layers)?;
    let window = match config.contains("sliding_window") {
        true => config.count(&["sliding_window"], MAX_POSITIONS)?.filter(|window| *window > 0),
        false => arch.window,
    };
    let by_flag = config.flag("use_sliding_window")?.unwrap_or(false);
    let flagged =
        matches!(arch.windows, Windows::FromLayerIfFlag | Windows::AllIfFlag | Windows::StatedIfFlag);
    let Some(window) = window.filter(|_| !flagged || by_flag) else { return Ok(vec![None; layers]) };
    if let Some(stated) = stated {
        return Ok(stated.into_iter().map(|windowed| windowed.then_some(window)).collect());
    }
    if arch.windows == Windows::StatedIfFlag {
        return Err(ModelError::config("layer_types", "missing", "a list, since use_sliding_window is true"));
    }
    let pattern = config.count(&["sliding_window_pattern", "_sliding_window_pattern"], MAX_LAYERS)?;
    let first = config.count(&["max_window_layers"], MAX_LAYERS)?.unwrap_or(28);
    let windowed = |layer: usize| match arch.windows {
        Windows::Never | Windows::StatedIfFlag => false,
        Windows::All | Windows::AllIfFlag => true,
        Windows::FromLayerIfFlag => layer >= first,
        Windows::AllButEach(each) => !(layer + 1).is_multiple_of(pattern.unwrap_or(each).max(1)),
    };
    Ok((0..layers).map(|layer| windowed(layer).then_some(window)).collect())
}

/// Which layers `layer_types` says have a window.
fn stated_windows(config: &Config, layers: usize) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(types) = config.texts("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(ModelError::config("layer_types", types.len(), format!("{layers} items")));
    }
    let windowed = |kind| match kind {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(ModelError::config("layer_types", other, "sliding_attention or full_attention")),
    };
    types.into_iter().map(windowed).collect::<Result<_, _>>().map(Some)
}

fn feed_forward(
    arch: &Arch,
    config: &Config,
    hidden: usize,
    sparse: bool,
) -> Result<FeedForward, ModelError> {
    if let Some(row) = &arch.experts
        && sparse
    {
        return experts(row, config);
    }
    let width = match config.count(&["intermediate_size", "n_inner"], MAX_WIDTH)? {
        Some(width) => width,
        None => 4 * hidden,
    };
    if width == 0 {
        return Err(ModelError::config("intermediate_size", 0, format!("a number from 1 to {MAX_WIDTH}")));
    }
    Ok(FeedForward::Dense { width })
}

/// Which layers have experts, in families that have them.
struct SparseLayers {
    step: usize,
    dense: HashSet<usize>,
}

impl SparseLayers {
    fn read(config: &Config) -> Result<Self, ModelError> {
        let step = config.count(&["decoder_sparse_step"], MAX_LAYERS)?.unwrap_or(1);
        let dense = config.numbers("mlp_only_layers")?.unwrap_or_default();
        Ok(Self { step, dense: dense.into_iter().map(|layer| layer as usize).collect() })
    }

    fn contains(&self, layer: usize) -> bool {
        self.step > 0 && (layer + 1).is_multiple_of(self.step) && !self.dense.contains(&layer)
    }
}

fn experts(row: &ExpertsRow, config: &Config) -> Result<FeedForward, ModelError> {
    let count = config.size(&["num_experts", "num_local_experts"], 1 << 14)?;
    let used = config.size(&["num_experts_per_tok"], count)?;
    let shared_width = match row.shared {
        true => Some(config.size(&["shared_expert_intermediate_size"], MAX_WIDTH)?),
        false => None,
    };
    Ok(FeedForward::Experts {
        count,
        used,
        width: config.size(&[row.width_field], MAX_WIDTH)?,
        renormalise: config.flag("norm_topk_prob")?.unwrap_or(row.renormalise),
        shared_width,
    })
}
