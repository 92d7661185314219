//! Chat templates: messages to the text that a model was trained on.
//!
//! Templates are Jinja2 programs out of model files. They run in minijinja, with no access to anything but their
//! arguments, on threads of their own, under limits on time, fuel, the sizes of template, output and values, and nesting. The environment is configured as in
//! transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop controls, its `tojson`,
//! `raise_exception`, `strftime_now`), and Python's printing of values is imitated, because templates print
//! lists and dictionaries of tool schemas.

mod clock;
mod ending;
mod environment;
mod formats;
mod generation;
mod guards;
mod json;
mod methods;
mod printing;
mod roomy;
mod tags;
mod template;
mod values;

pub use ending::Ending;
pub use template::ChatTemplate;
