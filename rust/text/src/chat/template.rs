//! One compiled chat template.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use minijinja::{Environment, ErrorKind, Value};

use super::ending::{Continued, Ending};
use super::environment;
use super::generation::without_generation_tags;
use super::{guards, roomy, tags, values};
use crate::error::{TextError, shielded};
use crate::folder::{self, SpecialTokens, read_optional};

/// Longest template source, in bytes (the longest published one has 16 kB).
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Longest rendered text, in bytes.
const MAX_OUTPUT_BYTES: usize = super::printing::MAX_BYTES;
/// Deepest nesting of messages and tools.
const MAX_DEPTH: usize = 100;
const NAME: &str = "chat";

/// A chat template, compiled once and rendered any number of times, from any number of threads.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: BTreeMap<&'static str, String>,
    source: String,
}

impl ChatTemplate {
    /// Compiles a template. The tokens are what the template sees as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`TextError::Template`] when the source is too long or is not valid Jinja2.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TextError::Template(format!(
                "the template has {} bytes; at most {MAX_SOURCE_BYTES} are accepted",
                source.len()
            )));
        }
        let special = [("bos_token", bos_token), ("eos_token", eos_token)];
        let special = special.into_iter().filter_map(|(name, t)| Some((name, t?.to_owned()))).collect();
        let mut environment = environment::new();
        let plain = without_generation_tags(source);
        let guarded = guards::guarded(&plain, &tags::tags(&plain)?);
        roomy::run(|| {
            let compiled =
                || environment.add_template_owned(NAME, guarded).map_err(|error| template_error(&error));
            shielded("chat template", AssertUnwindSafe(compiled))
        })?;
        Ok(ChatTemplate { environment, special, source: source.to_owned() })
    }

    /// The templates of a model folder by name; the usual one is called `default`, another common one `tool_use`.
    ///
    /// `chat_template.jinja` and `additional_chat_templates/*.jinja` come before `chat_template` in
    /// `tokenizer_config.json` (a string, or a list of names and templates) and `chat_template.json`. Each source is
    /// returned uncompiled, with the special tokens that it should see.
    ///
    /// # Errors
    /// A file that cannot be read or is malformed.
    pub fn sources(folder: &Path) -> Result<(BTreeMap<String, String>, SpecialTokens), TextError> {
        let config = folder::Config::read(folder)?;
        let mut sources = BTreeMap::new();
        for name in ["chat_template.json", "processor_config.json"] {
            let values = folder::read_object(folder, name)?;
            collect(values.get("chat_template"), &mut sources);
        }
        collect(config.values.get("chat_template"), &mut sources);
        if let Some(source) = read_template(&folder.join("chat_template.jinja"))? {
            sources.insert("default".to_owned(), source);
        }
        let more = folder.join("additional_chat_templates");
        let entries = match std::fs::read_dir(&more) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok((sources, config.special));
            }
            Err(error) => return Err(TextError::read(&more, error)),
        };
        for entry in entries {
            let path = entry.map_err(|error| TextError::read(&more, error))?.path();
            let name = path.file_stem().and_then(|stem| stem.to_str());
            if let Some(name) = name.filter(|_| path.extension().is_some_and(|e| e == "jinja"))
                && let Some(source) = read_template(&path)?
            {
                sources.insert(name.to_owned(), source);
            }
        }
        Ok((sources, config.special))
    }

    /// The compiled template of a model folder: the one called `name`, or without a name the usual one
    /// (`tool_use` when there are tools and the folder has it). `None` when there is no such template.
    ///
    /// # Errors
    /// As for [`ChatTemplate::sources`] and [`ChatTemplate::new`].
    pub fn from_folder(
        folder: &Path,
        name: Option<&str>,
        with_tools: bool,
    ) -> Result<Option<Self>, TextError> {
        let (sources, special) = ChatTemplate::sources(folder)?;
        let source = match name {
            Some(name) => sources.get(name),
            None if with_tools => sources.get("tool_use").or_else(|| sources.get("default")),
            None => sources.get("default"),
        };
        source
            .map(|source| ChatTemplate::new(source, special.bos.as_deref(), special.eos.as_deref()))
            .transpose()
    }

    /// Fixes what `strftime_now` sees, in seconds since 1970 (UTC), so that a rendering can be repeated.
    #[must_use]
    pub fn at_time(mut self, unix_seconds: i64) -> Self {
        environment::set_clock(&mut self.environment, Some(unix_seconds));
        self
    }

    /// The source of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages` (a list of objects with `role` and `content`).
    ///
    /// `tools` are JSON schemas, `extra` further names that the template may read (`enable_thinking`,
    /// `documents`, ...). `extra` cannot replace `messages`, `tools` and `add_generation_prompt` (which `ending` gives).
    ///
    /// # Errors
    /// [`TextError::Template`]: the template called `raise_exception`, failed on these messages, or went over a
    /// limit (time, fuel, size of the output and of values, nesting), or the last message cannot be continued.
    pub fn render(
        &self,
        messages: &serde_json::Value,
        tools: Option<&serde_json::Value>,
        ending: Ending,
        extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let Some(list) = messages.as_array() else {
            return Err(TextError::Template("messages: expected a list of messages".to_owned()));
        };
        if let Some(place) = list.iter().position(|message| !message.is_object()) {
            return Err(TextError::Template(format!(
                "messages[{place}]: expected an object with `role` and `content`, got {:.80}",
                list[place].to_string()
            )));
        }
        if tools.is_some_and(|tools| !tools.is_array() && !tools.is_null()) {
            return Err(TextError::Template("tools: expected a list of function descriptions".to_owned()));
        }
        let entries = tools.and_then(serde_json::Value::as_array).map_or(&[][..], Vec::as_slice);
        if let Some(place) = entries.iter().position(|tool| !tool.is_object()) {
            return Err(TextError::Template(format!(
                "tools[{place}]: expected an object, a function's description, got {:.80}",
                entries[place].to_string()
            )));
        }
        let deepest = extra.values().chain([messages]).chain(tools).map(depth).max().unwrap_or(0);
        if deepest > MAX_DEPTH {
            return Err(TextError::Template(format!(
                "messages or tools are nested more than {MAX_DEPTH} levels deep"
            )));
        }
        let continued = (ending == Ending::Open).then(|| Continued::of(messages)).transpose()?;
        let messages = continued.as_ref().map_or(messages, |continued| &continued.messages);
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([("documents", Value::from(()))]);
        context.extend(self.special.iter().map(|(name, token)| (*name, Value::from(token.as_str()))));
        context.extend(extra.iter().map(|(name, value)| (name.as_str(), environment::value_of(value))));
        context.insert("messages", environment::messages_of(messages));
        context.insert("tools", tools.map_or(Value::from(()), environment::value_of));
        context.insert("add_generation_prompt", Value::from(ending == Ending::GenerationPrompt));
        let text = roomy::run(|| {
            values::start_clock();
            shielded("chat template", AssertUnwindSafe(|| self.run(context)))
        })?;
        match continued {
            Some(continued) => continued.cut(&text),
            None => Ok(text),
        }
    }

    fn run(&self, context: BTreeMap<&str, Value>) -> Result<String, TextError> {
        let mut output = Limited(Vec::new());
        let result = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(Value::from(context), &mut output).map(drop));
        if output.0.len() >= MAX_OUTPUT_BYTES {
            return Err(TextError::Template(format!("the output is longer than {MAX_OUTPUT_BYTES} bytes")));
        }
        result.map_err(|error| template_error(&error))?;
        String::from_utf8(output.0).map_err(|error| TextError::Template(error.to_string()))
    }
}

/// Refuses to grow past the limit.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = MAX_OUTPUT_BYTES - self.0.len();
        let taken = bytes.len().min(room);
        self.0.extend_from_slice(&bytes[..taken]);
        if taken < bytes.len() { Err(std::io::Error::other("output too long")) } else { Ok(taken) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn template_error(error: &minijinja::Error) -> TextError {
    let line = error.line().map(|line| format!(" (line {line} of the template)")).unwrap_or_default();
    let detail = error.detail().map(str::to_owned).unwrap_or_else(|| error.kind().to_string());
    TextError::Template(match error.kind() {
        _ if detail.starts_with(environment::RAISED) => detail[environment::RAISED.len()..].to_owned(),
        ErrorKind::OutOfFuel => format!("it took too many steps{line}; is there an endless loop?"),
        ErrorKind::SyntaxError => format!("not a valid template: {detail}{line}"),
        kind => format!("{kind}: {detail}{line}"),
    })
}

fn depth(value: &serde_json::Value) -> usize {
    fn below(value: &serde_json::Value, level: usize) -> usize {
        if level > MAX_DEPTH {
            return level;
        }
        let deepest = |values: &mut dyn Iterator<Item = &serde_json::Value>| {
            values.map(|value| below(value, level + 1)).max().unwrap_or(level)
        };
        match value {
            serde_json::Value::Array(values) => deepest(&mut values.iter()),
            serde_json::Value::Object(map) => deepest(&mut map.values()),
            _ => level,
        }
    }
    below(value, 0)
}

fn collect(value: Option<&serde_json::Value>, sources: &mut BTreeMap<String, String>) {
    match value {
        Some(serde_json::Value::String(source)) => {
            sources.insert("default".to_owned(), source.clone());
        }
        Some(serde_json::Value::Array(list)) => {
            for entry in list {
                let text = |key: &str| entry.get(key).and_then(|v| v.as_str()).map(str::to_owned);
                if let (Some(name), Some(source)) = (text("name"), text("template")) {
                    sources.insert(name, source);
                }
            }
        }
        Some(serde_json::Value::Object(map)) => {
            sources.extend(map.iter().filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))));
        }
        _ => {}
    }
}

fn read_template(path: &Path) -> Result<Option<String>, TextError> {
    let Some(bytes) = read_optional(path, MAX_SOURCE_BYTES as u64)? else { return Ok(None) };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    String::from_utf8(bytes).map(Some).map_err(|error| TextError::invalid(name, error))
}
