//! Templates that recurse, nest, multiply or run without end become errors, on any thread; long conversations are rendered.

use infer_text::{ChatTemplate, Ending};
use serde_json::{Map, Value, json};

fn render_messages(source: &str, messages: &Value) -> Result<String, String> {
    let template = ChatTemplate::new(source, None, None).map_err(|error| error.to_string())?;
    let rendered = template.render(messages, None, Ending::GenerationPrompt, &Map::new());
    rendered.map_err(|error| error.to_string())
}

fn render(source: &str) -> Result<String, String> {
    render_messages(source, &json!([{"role": "user", "content": "x"}]))
}

/// Renders on a thread with little stack.
fn render_in_little(source: &str) -> Result<String, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(1 << 19);
        thread.spawn_scoped(scope, || render(source)).unwrap().join().unwrap()
    })
}

#[test]
fn chains_are_bounded() {
    for link in [
        "+1",
        "-1",
        "~1",
        " and 1",
        " or 1",
        "**1",
        "*1",
        "<1",
        ".a",
        "[0]",
        "|int",
        "()",
        " if 1 else 1",
        " is odd",
    ] {
        let error = render_in_little(&format!("{{{{ 1{} }}}}", link.repeat(10_000))).unwrap_err();
        assert!(error.contains("a tag has more than 2000 words"), "{link}: {error}");
        let tokens = if link.contains("else") { 4 } else { link.split(' ').count() + 2 };
        // What the bound lets pass has room.
        let _ = render_in_little(&format!("{{{{ 1{} }}}}", link.repeat(1990 / tokens)));
    }
    for opening in ["not ", "-", "("] {
        let error = render_in_little(&format!("{{{{ {}1", opening.repeat(10_000))).unwrap_err();
        assert!(error.contains("a tag has more than 2000 words"), "{opening}: {error}");
        let _ = render_in_little(&format!("{{{{ {}1 }}}}", opening.repeat(1990)));
        let _ = render_in_little(&format!("{{% set {}a = 1 %}}", opening.repeat(1990)));
    }
    let branches = |count| format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 1 %}x".repeat(count));
    assert!(render_in_little(&branches(5000)).unwrap_err().contains("5000 `elif`s; at most 500"));
    assert_eq!(render_in_little(&branches(500)).as_deref(), Ok("x"));
    assert!(render("{{ 1) + (2 }}").unwrap_err().contains("unexpected `)` (line 1"));
    assert_eq!(
        render("{% raw %}{{ ) {% if %} '{% endraw %}{{ '}}' ~ {'a': {}}.a }}").as_deref(),
        Ok("{{ ) {% if %} '}}{}")
    );
}

#[test]
fn values_are_bounded() {
    let loops = |start: &str, step: &str, rest: &str| {
        format!(
            "{{% set ns = namespace(a={start}) %}}{{% for i in range(100000) %}}{step}{{% endfor %}}{rest}"
        )
    };
    for (source, expected) in [
        (loops("[]", "{% set ns.a = [ns.a] %}", ""), "nested more than 200 levels"),
        (loops("[]", "{% set ns.a = {'a': ns.a} %}", ""), "nested more than 200 levels"),
        (loops("[]", "{% set ns.a = (ns.a, 1) %}", ""), "nested more than 200 levels"),
        (loops("[]", "{% set ns.a = ns.a, 1 %}", ""), "nested more than 200 levels"),
        (loops("[1]", "{% set ns.a = ns.a|batch(1)|batch(1) %}", ""), "nested more than"),
        (loops("[1]", "{% set ns.a = [ns.a, ns.a] %}", "{{ ns.a }}"), "more than 1048576 items"),
        (loops("[1]", "{% set ns.a = ns.a + ns.a %}", "{{ ns.a|list|length }}"), "more than 1048576 items"),
        (loops("'xxxxxxxx'", "{% set ns.a = ns.a ~ ns.a %}", ""), "bytes of text"),
        (loops("'xxxxxxxx'", "{% set ns.a = '%s%s'|format(ns.a, ns.a) %}", ""), "bytes"),
        (loops("'xxxxxxxx'", "{% set ns.a = '{0}{0}'.format(ns.a) %}", ""), "bytes"),
        (loops("'xxxxxxxx'", "{% set ns.a = [ns.a, ns.a]|join %}", ""), "bytes of text"),
        (loops("'xxxxxxxx'", "{% set ns.a = ns.a.join([1, 2, 3]) %}", ""), "bytes of text"),
        (loops("'xxxxxxxx'", "{% set ns.a = ns.a.replace('x', 'xx') %}", ""), "bytes of text"),
        (loops("'xxxxxxxx'", "{% set ns.a = ns.a * 2 %}", ""), "too large"),
        (
            "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns.a }}".to_owned(),
            "a namespace cannot be part",
        ),
        (
            "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns == ns }}".to_owned(),
            "a namespace cannot be part",
        ),
        ("{% set x = [1] * 99999999 %}".to_owned(), "a list cannot be multiplied"),
        ("{{ (99999999 * [[1] * 99999999]) ~ '' }}".to_owned(), "a list cannot be multiplied"),
        ("{{ 99999999 * messages[0:] == 3 }}".to_owned(), "a list cannot be multiplied"),
        ("{% macro m(a) %}{% endmacro %}{{ m(LONG) }}".to_owned(), "more than 1048576 items"),
        ("{% for b in [LONG] %}{% endfor %}".to_owned(), "more than 1048576 items"),
        ("{% with b = LONG %}{% endwith %}".to_owned(), "more than 1048576 items"),
        (
            "{% set b = [a, a, a, a, a] %}{{ [b, b, b, b, b, b, b, b, b] }}".to_owned(),
            "too long to be printed",
        ),
        (
            "{% set b = [a, a, a, a, a] %}{{ [b, b, b, b, b, b, b, b, b]|tojson }}".to_owned(),
            "too long to be printed",
        ),
    ] {
        let long = source.replace("LONG", &format!("(a{})", " + a".repeat(12)));
        let result = render_in_little(&format!("{{% set a = range(99999)|list %}}{long}"));
        let refused = result.as_ref().is_err_and(|error| error.contains(expected));
        assert!(refused, "{source}: {result:?}");
    }
    // What is computed for each use is made a list when it is assigned, and so does not nest.
    for step in ["ns.a[0:]", "ns.a|reverse", "ns.a + []", "ns.a|map('int')", "ns.a|list"] {
        let source = loops("[1, 2]", &format!("{{% set ns.a = {step} %}}"), "{{ ns.a }}");
        assert!(matches!(render_in_little(&source).as_deref(), Ok("[1, 2]" | "[2, 1]")), "{step}");
    }
    let maps = loops("{'a': 1}", "{% set ns.a = ns.a|chain({'b': i}) %}", "{{ ns.a.b }}");
    assert_eq!(render_in_little(&maps).as_deref(), Ok("99999"));
}

#[test]
fn formats_are_bounded() {
    for source in [
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:.99999999}'.format(1.5) }}",
        "{{ '%999999999d'|format(1)|length }}",
        "{{ '%.999999999f'|format(1) }}",
        "{{ '%(a)2000s'|format(a=1) }}",
    ] {
        let error = render(source).unwrap_err();
        assert!(error.contains("expected a width and a precision of at most 1024"), "{source}: {error}");
    }
    let repeated = format!("{{{{ '{}'.format('x' * 1000000) }}}}", "{0}".repeat(1000));
    assert!(render(&repeated).unwrap_err().contains("may have more than"));
    for (source, expected) in [
        ("{{ '{:>5} {} {{9999}} 9999'.format(1, 'b') }}", "    1 b {9999} 9999"),
        ("{{ '%5.1f %s 100%% 9999 %(x)'|format(1, 'b')|length }}", "0"),
        ("{{ '%5.1f %s 100%% 9999'|format(1, 'b') }}", "  1.0 b 100% 9999"),
        ("{{ '%(a)s'|format(a=[1]) }}", "[1]"),
    ] {
        if expected != "0" {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }
}

#[test]
fn long_conversations_are_rendered() {
    let content = "Some words of a message that is neither long nor short. ".repeat(8);
    let messages: Vec<Value> = (0..5000)
        .map(|turn| json!({"role": if turn % 2 == 0 { "user" } else { "assistant" }, "content": content}))
        .collect();
    let source = "{% set ns = namespace(list=[], text='') %}{% for message in messages %}\
        {% set ns.list = ns.list + [message] %}{% endfor %}\
        {% for message in ns.list[1:] %}{% for i in range(200) %}{% set x = i %}{% endfor %}\
        {{ message.role ~ ': ' ~ message['content'].split('. ')|join('.\n') }}{% endfor %}";
    let text = render_messages(source, &json!(messages)).unwrap();
    assert_eq!(text.matches("Some words").count(), 8 * 4999);
}
