//! The tokenizer and chat template as Python sees them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use infer_model::Checkpoint;
use infer_text::{ChatTemplate, Ending, TextError};
use pyo3::prelude::*;
use pyo3::types::PyString;
use serde_json::{Map, Value};

use crate::convert::{Arg, Int, text, token_ids};
use crate::error::{guarded, refusal};
use crate::json::{to_json, to_map};
use crate::vocabulary;
use crate::wait::{briefly, interruptible};

/// Text beyond this is encoded on a thread of its own, so that Ctrl-C need not wait for it.
const LONG_TEXT: usize = 1 << 16;

/// Names that a template cannot be given: what it gets from arguments, and what transformers' function of this name would do
/// afterwards. As variables they would be ignored without a word; None and False ask for nothing.
const NO_VARIABLES: [&str; 9] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "padding",
    "truncation",
    "max_length",
];

/// How a conversation ends.
fn ending(add_generation_prompt: bool, continue_final_message: bool) -> PyResult<Ending> {
    match (add_generation_prompt, continue_final_message) {
        (true, true) => Err(refusal(
            "continue_final_message must be False where add_generation_prompt is True: an answer is begun, or the last message goes on",
        )),
        (true, false) => Ok(Ending::GenerationPrompt),
        (false, true) => Ok(Ending::Open),
        (false, false) => Ok(Ending::Closed),
    }
}

fn asks(value: Option<&Value>) -> bool {
    value.is_some_and(|value| !matches!(value, Value::Null | Value::Bool(false)))
}

/// A model's text side: shared by the engine and every Python object that shows it.
pub struct TextModel {
    pub tokenizer: infer_text::Tokenizer,
    /// The template's source, and the template unless it does not compile.
    template: Option<(String, Result<ChatTemplate, String>)>,
    /// The one for conversations with tools, where a model has two.
    tool_template: Option<Result<ChatTemplate, String>>,
    bos: Option<String>,
    eos: Option<String>,
    pub eos_token_ids: Vec<u32>,
}

impl TextModel {
    /// Reads the tokenizer of an opened checkpoint; none when it has none.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Option<Self>, String> {
        let found = match &checkpoint.metadata {
            Some(metadata) => {
                let path = checkpoint.path().display();
                Self::of_metadata(metadata).map_err(|error| format!("{path}: {error}"))?
            }
            None => Self::of_folder(checkpoint.path())?,
        };
        Ok(found.map(|mut text| {
            text.eos_token_ids.extend_from_slice(&checkpoint.spec.eos_token_ids);
            text.eos_token_ids.sort_unstable();
            text.eos_token_ids.dedup();
            text
        }))
    }

    fn of_metadata(metadata: &infer_formats::Metadata) -> Result<Option<Self>, String> {
        let Some(mut vocabulary) = vocabulary::from_metadata(metadata)? else { return Ok(None) };
        let tokenizer = infer_text::Tokenizer::from_gguf(&vocabulary).map_err(|error| error.to_string())?;
        let Some(tokenizer) = tokenizer else { return Ok(None) };
        let spelling = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        let (bos, eos) = (spelling(tokenizer.bos()), spelling(tokenizer.eos()));
        let tools = vocabulary.named_templates.remove("tool_use");
        Ok(Some(Self::new(tokenizer, vocabulary.chat_template, tools, bos, eos)))
    }

    fn of_folder(path: &Path) -> Result<Option<Self>, String> {
        let read = || -> Result<Option<Self>, TextError> {
            let Some(tokenizer) = infer_text::Tokenizer::from_folder(path)? else { return Ok(None) };
            let (mut sources, special) = ChatTemplate::sources(path)?;
            let (template, tools) = (sources.remove("default"), sources.remove("tool_use"));
            Ok(Some(Self::new(tokenizer, template, tools, special.bos, special.eos)))
        };
        read().map_err(|error| match error {
            TextError::Read { .. } => error.to_string(),
            _ => format!("{}: {error}", path.display()),
        })
    }

    fn new(
        tokenizer: infer_text::Tokenizer,
        template: Option<String>,
        tool_template: Option<String>,
        bos: Option<String>,
        eos: Option<String>,
    ) -> Self {
        // A template that does not compile harms nobody who does not chat.
        let compile = |source: &str| {
            ChatTemplate::new(source, bos.as_deref(), eos.as_deref()).map_err(|error| error.to_string())
        };
        let template = template.map(|source| {
            let compiled = compile(&source);
            (source, compiled)
        });
        let tool_template = tool_template.map(|source| compile(&source));
        let eos_token_ids =
            tokenizer.eos().into_iter().chain(tokenizer.end_of_turn().iter().copied()).collect();
        Self { template, tool_template, tokenizer, bos, eos, eos_token_ids }
    }

    /// The source of the usual chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_ref().map(|(source, _)| source.as_str())
    }

    fn choose_template(&self, source: Option<&str>, with_tools: bool) -> Result<ChatTemplate, String> {
        if let Some(source) = source {
            let made = ChatTemplate::new(source, self.bos.as_deref(), self.eos.as_deref());
            return made.map_err(|error| error.to_string());
        }
        let usual = self.template.as_ref().map(|(_, compiled)| compiled);
        let chosen = self.tool_template.as_ref().filter(|_| with_tools).or(usual);
        let missing =
            || "this model has no chat template; pass chat_template=, or use generate with a plain prompt";
        chosen.ok_or_else(|| missing().to_owned())?.clone()
    }
}

/// The tokens of a prompt: text for the model's tokenizer, if it has one, or token ids.
pub fn prompt_ids(
    py: Python<'_>,
    model: Option<&Arc<TextModel>>,
    path: &str,
    prompt: &Bound<'_, PyAny>,
    add_special_tokens: bool,
) -> PyResult<Vec<u32>> {
    if !prompt.is_instance_of::<PyString>() {
        return token_ids("prompt", prompt);
    }
    let Some(model) = model else {
        return Err(refusal(format!("{path} has no tokenizer; give token ids instead of text")));
    };
    encode(py, model, text("prompt", prompt)?, add_special_tokens)
}

/// Encodes, interruptibly when the text is long.
pub fn encode(py: Python<'_>, model: &Arc<TextModel>, text: String, add_special: bool) -> PyResult<Vec<u32>> {
    let model = Arc::clone(model);
    let (size, long) = (text.len(), text.len() > LONG_TEXT);
    let work = move || model.tokenizer.encode(&text, add_special).map_err(|error| error.to_string());
    if long { interruptible(py, "infer-encode", work) } else { briefly(py, size, work).map_err(refusal) }
}

/// A model's own tokenizer and chat template.
#[pyclass(frozen, module = "infer._core")]
pub struct Tokenizer {
    model: Arc<TextModel>,
}

impl Tokenizer {
    pub fn new(model: Arc<TextModel>) -> Self {
        Self { model }
    }
}

#[pymethods]
impl Tokenizer {
    /// Of a model folder or GGUF file, without loading weights; None when it has none.
    #[staticmethod]
    fn from_path(py: Python<'_>, path: PathBuf) -> PyResult<Option<Self>> {
        guarded(|| {
            let found = interruptible(py, "infer-load", move || {
                // A folder of tokenizer files alone is enough.
                let folder = if path.is_dir() { TextModel::of_folder(&path)? } else { None };
                match folder {
                    Some(text) => Ok(Some(text)),
                    None => {
                        let opened = Checkpoint::open(&path, true).map_err(|error| error.to_string())?;
                        TextModel::of_checkpoint(&opened)
                    }
                }
            })?;
            Ok(found.map(|model| Self { model: Arc::new(model) }))
        })
    }

    /// The token ids of a text.
    #[pyo3(signature = (text, *, add_special_tokens=Arg::of(true)), text_signature = "($self, text, *, add_special_tokens=True)")]
    fn encode(
        &self,
        py: Python<'_>,
        text: &Bound<'_, PyAny>,
        add_special_tokens: Arg<bool>,
    ) -> PyResult<Vec<u32>> {
        guarded(|| {
            let add_special = add_special_tokens.flag("add_special_tokens")?;
            encode(py, &self.model, crate::convert::text("text", text)?, add_special)
        })
    }

    /// The text of token ids.
    #[pyo3(
        signature = (token_ids, *, skip_special_tokens=Arg::of(true)),
        text_signature = "($self, token_ids, *, skip_special_tokens=True)"
    )]
    fn decode(
        &self,
        py: Python<'_>,
        token_ids: &Bound<'_, PyAny>,
        skip_special_tokens: Arg<bool>,
    ) -> PyResult<String> {
        guarded(|| {
            let skip_special = skip_special_tokens.flag("skip_special_tokens")?;
            let ids = crate::convert::token_ids("token_ids", token_ids)?;
            Ok(py.detach(|| self.model.tokenizer.decode(&ids, skip_special)))
        })
    }

    /// The conversation as the prompt text.
    #[pyo3(
        signature = (
            messages, *, tools=None, add_generation_prompt=Arg::of(false), continue_final_message=Arg::of(false), chat_template=None,
            template_kwargs=None
        ),
        text_signature = "($self, messages, *, tools=None, add_generation_prompt=False, continue_final_message=False, \
            chat_template=None, template_kwargs=None)"
    )]
    fn apply_chat_template(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        tools: Option<&Bound<'_, PyAny>>,
        add_generation_prompt: Arg<bool>,
        continue_final_message: Arg<bool>,
        chat_template: Option<&Bound<'_, PyAny>>,
        template_kwargs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<String> {
        guarded(|| {
            let ending = ending(
                add_generation_prompt.flag("add_generation_prompt")?,
                continue_final_message.flag("continue_final_message")?,
            )?;
            let source = chat_template.map(|source| text("chat_template", source)).transpose()?;
            let messages = to_json("messages", messages)?;
            let tools = tools.map(|tools| to_json("tools", tools)).transpose()?;
            let extra = template_kwargs.map_or(Ok(Map::new()), |extra| to_map("template_kwargs", extra))?;
            if let Some(name) = NO_VARIABLES.iter().find(|name| asks(extra.get(**name))) {
                return Err(refusal(format!(
                    "{name} is no variable of a chat template: messages, tools and add_generation_prompt are arguments, and \
                     what transformers does to the rendered text is not done here"
                )));
            }
            let model = Arc::clone(&self.model);
            // A hostile template may run until its time or its fuel is spent.
            interruptible(py, "infer-template", move || {
                let template = model.choose_template(source.as_deref(), tools.is_some())?;
                let rendered = template.render(&messages, tools.as_ref(), ending, &extra);
                rendered.map_err(|error| error.to_string())
            })
        })
    }

    /// A token's id.
    fn token_to_id(&self, token: &Bound<'_, PyAny>) -> PyResult<Option<u32>> {
        guarded(|| Ok(self.model.tokenizer.id(&text("token", token)?)))
    }

    /// A token as the vocabulary spells it.
    fn id_to_token(&self, token_id: Arg<Int>) -> PyResult<Option<String>> {
        guarded(|| {
            let Int(id) = token_id.get("token_id", "an integer")?;
            Ok(u32::try_from(id).ok().and_then(|id| self.model.tokenizer.token(id)))
        })
    }

    /// Number of tokens, added ones included.
    #[getter]
    fn vocabulary_size(&self) -> usize {
        self.model.tokenizer.vocabulary_size()
    }

    /// The token that begins a text.
    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.model.tokenizer.bos()
    }

    /// The tokens that end an answer.
    #[getter]
    fn eos_token_ids(&self) -> Vec<u32> {
        self.model.eos_token_ids.clone()
    }

    /// The model's own Jinja template.
    #[getter]
    fn chat_template(&self) -> Option<&str> {
        self.model.chat_template()
    }
}
