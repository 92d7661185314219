//! Chat templates against what Jinja2 rendered (see `generate_templates.py`).

mod common;

use std::collections::BTreeMap;

use common::shared;
use infer_text::{ChatTemplate, Ending};
use serde_json::Value;

/// The moment at which `generate_templates.py` stops `strftime_now`.
const NOW: i64 = 1_751_641_567;

/// Failures of Jinja2 where this crate renders: minijinja takes `none` for an empty list, and lets `tojson` write
/// what `map` and its like give (templates in GGUF files count on the latter).
const LENIENT: [&str; 2] = [
    "error: TypeError: 'NoneType' object is not iterable",
    "error: TypeError: Object of type generator is not JSON serializable",
];

/// Jinja2 gives HTML escapes here, certainly not what the authors meant: `safe` makes a string that escapes
/// whatever is added to it, even without autoescaping. (template, request)
const ESCAPED_BY_SAFE: [(&str, &str); 2] = [
    ("llamacpp/meetkai-functionary-medium-v3.1.jinja", "tools"),
    ("llamacpp/meetkai-functionary-medium-v3.1.jinja", "tool_call_text_arguments"),
];

fn read(name: &str) -> Value {
    let path = format!("{}/tests/templates/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn render(source: &str, request: &Value) -> Result<String, String> {
    let template = ChatTemplate::new(source, Some("<s>"), Some("</s>")).map_err(|e| e.to_string())?;
    let extra = request.get("extra").and_then(Value::as_object).cloned().unwrap_or_default();
    let prompt = request["add_generation_prompt"].as_bool().unwrap();
    let ending = if prompt { Ending::GenerationPrompt } else { Ending::Closed };
    template
        .at_time(NOW)
        .render(&request["messages"], request.get("tools"), ending, &extra)
        .map_err(|error| error.to_string())
}

fn fnv1a(text: &str) -> u64 {
    text.bytes()
        .fold(0xCBF2_9CE4_8422_2325, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// Templates beside the repository, by the names that `generate_templates.py` gives them.
fn shared_sources() -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let Some(root) = shared("data/prompts/chat_templates") else { return sources };
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
            } else if name.ends_with(".jinja") {
                sources.insert(name, std::fs::read_to_string(path).unwrap());
            } else if name.ends_with(".json") {
                let values: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
                if let Some(source) = values.get("chat_template").and_then(Value::as_str) {
                    sources.insert(name.clone(), source.to_owned());
                }
                for (index, case) in
                    values.get("cases").and_then(Value::as_array).into_iter().flatten().enumerate()
                {
                    sources.insert(format!("{name}#{index}"), case["template"].as_str().unwrap().to_owned());
                }
            }
        }
    }
    sources
}

#[test]
fn own_templates_equal_jinja2() {
    let (requests, expected) = (read("requests.json"), read("own.json"));
    for (file, results) in expected.as_object().unwrap() {
        let path = format!("{}/tests/templates/{file}", env!("CARGO_MANIFEST_DIR"));
        let source = std::fs::read_to_string(path).unwrap();
        for request in requests.as_array().unwrap() {
            let name = request["name"].as_str().unwrap();
            let expected = &results[name];
            match (expected.get("text").and_then(Value::as_str), render(&source, request)) {
                (Some(text), Ok(rendered)) => assert_eq!(rendered, text, "{file}, {name}"),
                (None, Err(_)) => {}
                (_, rendered) => panic!("{file}, {name}: expected {expected}, got {rendered:?}"),
            }
        }
    }
}

#[test]
fn shared_templates_equal_jinja2() {
    let (requests, expected) = (read("requests.json"), read("shared.json"));
    let mut differing = Vec::new();
    let (mut texts, mut errors, mut lenient) = (0, 0, 0);
    for (name, source) in shared_sources() {
        for request in requests.as_array().unwrap() {
            let case = request["name"].as_str().unwrap();
            let digest = expected.get(&name).and_then(|results| results.get(case)?.as_str());
            let digest = digest.unwrap_or_else(|| panic!("{name}, {case}: run generate_templates.py"));
            let rendered = render(&source, request);
            match &rendered {
                Ok(text) if format!("{}:{:016x}", text.len(), fnv1a(text)) == digest => texts += 1,
                Err(_) if digest.starts_with("error") => errors += 1,
                Ok(_) if LENIENT.contains(&digest) => lenient += 1,
                Ok(text) if ESCAPED_BY_SAFE.contains(&(&name, case)) => {
                    assert!(text.contains("it's") || case != "tools")
                }
                _ => differing.push(format!("{name}, {case}: expected {digest}, got {rendered:?}")),
            }
        }
    }
    assert!(
        differing.is_empty(),
        "{} differ ({texts} equal, {errors} fail in both, {lenient} fail in Jinja2 only)\n{}",
        differing.len(),
        differing.join("\n")
    );
}

/// What transformers 5 gives with `continue_final_message=True`.
#[test]
fn a_last_message_is_left_open() {
    let own = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>\n{% endfor %}";
    let trims = own.replace("message.content", "message.content | trim");
    let render = |source: &str, content: Value| {
        let messages =
            serde_json::json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]);
        let template = ChatTemplate::new(source, None, None).unwrap();
        let rendered = template.render(&messages, None, Ending::Open, &serde_json::Map::new());
        rendered.map_err(|error| error.to_string())
    };
    let text = |source: &str, content: &str| render(source, Value::from(content)).unwrap();
    assert_eq!(text(own, "Once "), "<user>Hi</>\n<assistant>Once ");
    assert_eq!(text(&trims, "Once "), "<user>Hi</>\n<assistant>Once", "the template takes the blank");
    assert_eq!(text(own, "Hi"), "<user>Hi</>\n<assistant>Hi");
    assert_eq!(text(own, ""), "<user>Hi</>\n<assistant>");
    let parts =
        serde_json::json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]);
    let joins = own.replace("message.content", "message.content if message.content is string else message.content | map(attribute='text') | join('|')");
    assert_eq!(render(&joins, parts).unwrap(), "<user>Hi</>\n<assistant>a|b");
    for (source, content) in
        [(own, Value::Null), (own, Value::from(5)), ("{{ messages[0].content }}", Value::from("a"))]
    {
        assert!(render(source, content).unwrap_err().contains("continue_final_message"));
    }
    let rewrites = own.replace("message.content", "message.content.split('</think>')[-1]");
    let refused = render(&rewrites, Value::from("<think>x</think>Yes")).unwrap_err();
    assert!(refused.contains("the template changes the last message"), "{refused}");
    let template = ChatTemplate::new(own, None, None).unwrap();
    let none = template.render(&serde_json::json!([]), None, Ending::Open, &serde_json::Map::new());
    assert!(none.unwrap_err().to_string().contains("no message to continue"));
}
