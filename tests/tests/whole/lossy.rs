//! Sessions that cold tiers keep as FP8: over HTTP, from the layout's field to a conversation that goes on.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keepwarm_tests::{Answer, Server, Setup, bytes_layout, paged_layout, send};
use reqwest::Method;
use serde_json::{Value, json};
use twox_hash::XxHash3_128;

const TOKEN: usize = 64;

/// A layout of one part of 64 bytes a token, kept as FP8 of halves.
fn layout() -> Value {
    let mut layout = paged_layout();
    layout["parts"][0]["order"] = json!("plane");
    layout["parts"][0]["cold"] = json!({"dtype": "fp8", "from": "f16"});
    layout
}

/// Halves between 1 and 2, or between -2 and -1.
fn halves(tokens: usize) -> Vec<u8> {
    let bits = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16;
    (0..(tokens * TOKEN / 2) as u64).flat_map(|n| (bits(n) & 0x83ff | 0x3c00).to_le_bytes()).collect()
}

/// A half that is no subnormal number.
fn number(half: &[u8]) -> f32 {
    let bits = u16::from_le_bytes([half[0], half[1]]);
    let magnitude = (1.0 + f32::from(bits & 0x3ff) / 1024.0) * 2_f32.powi(i32::from(bits >> 10 & 0x1f) - 15);
    if bits & 0x8000 == 0 { magnitude } else { -magnitude }
}

fn digest(bytes: &[u8]) -> String {
    format!("xxh3-128=:{}:", STANDARD.encode(XxHash3_128::oneshot(bytes).to_be_bytes()))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_is_near_to_what_was_written_and_does_not_drift() {
    let server = Server::start(None, Setup::default()).await;
    let path = server.session(&layout()).await;
    let part = format!("{path}/parts/kv");
    let patch = |bytes: Vec<u8>| {
        let digest = digest(&bytes);
        server.request(Method::PATCH, &format!("{part}?offset=0")).header("repr-digest", digest).body(bytes)
    };
    let written = halves(40);
    let first = send(patch(written.clone())).await;
    assert_eq!(
        (first.status, first.json()["length_bytes"].as_u64()),
        (200, Some(2560)),
        "{:?}",
        first.json()
    );
    let session = server.get(&path).await.json();
    assert_eq!((&session["lossy"], &session["layout"]), (&json!(true), &layout()));
    // Two full blocks of 4 scales and 512 codes, and one of 256.
    assert_eq!(
        (&session["parts"]["kv"]["length_bytes"], &session["tiers"]["pinned"]),
        (&json!(2560), &json!(1328))
    );
    let read = server.get(&part).await;
    assert_eq!((read.status, read.body.len()), (200, written.len()));
    assert_ne!(read.body, written);
    assert_eq!(read.header("repr-digest"), None, "what came had one, and is not what is sent");
    for (before, after) in written.chunks(2).zip(read.body.chunks(2)) {
        let (before, after) = (number(before), number(after));
        assert!((before - after).abs() <= before.abs() / 16.0, "{before} came back as {after}");
    }
    assert_eq!(send(patch(read.body.clone())).await.status, 200);
    assert_eq!(server.get(&part).await.body, read.body);
    let range = send(server.request(Method::GET, &part).header("range", "bytes=1000-1999")).await;
    assert_eq!((range.status, &range.body[..]), (206, &read.body[1000..2000]));
    let inside = server.patch(&format!("{part}?offset=40"), halves(1)).await;
    assert_eq!(
        (inside.code(), inside.json()["field"].as_str()),
        ("invalid_field".to_owned(), Some("offset"))
    );
    let exact = server.session(&bytes_layout()).await;
    assert_eq!(server.get(&exact).await.json()["lossy"], false);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_form_that_cannot_be_names_its_field() {
    type Change = fn(&mut Value);
    let server = Server::start(None, Setup::default()).await;
    let refused = async |change: Change| {
        let mut layout = layout();
        change(&mut layout["parts"][0]);
        let answer = server.post("/v1/sessions", &json!({"layout": layout})).await;
        (answer.code(), answer.json()["field"].as_str().unwrap_or_default().to_owned())
    };
    let changes: [(Change, &str); 3] = [
        (|part| part["order"] = json!("token"), "layout.parts[0].cold"),
        (|part| part["plane_bytes_per_token"] = json!(15), "layout.parts[0].cold.from"),
        (|part| part["tokens_per_block"] = json!(0), "layout.parts[0].tokens_per_block"),
    ];
    for (change, field) in changes {
        assert_eq!(refused(change).await, ("invalid_field".to_owned(), field.to_owned()));
    }
    let unknown: [Change; 3] = [
        |part| part["cold"]["from"] = json!("f64"),
        |part| part["cold"]["dtype"] = json!("int4"),
        |part| part["cold"]["scale"] = json!(1),
    ];
    for change in unknown {
        assert_eq!(refused(change).await.0, "invalid_field");
    }
    let mut window = layout();
    window["parts"][0]["form"] = json!("window");
    window["parts"][0]["window_tokens"] = json!(9);
    assert_eq!(server.post("/v1/sessions", &json!({"layout": window})).await.code(), "invalid_field");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_says_fp8_goes_on_after_it_was_evicted() {
    let server = Server::start(None, Setup::default()).await;
    let ask = async |session: Option<&str>, cold: Option<&str>, messages: &Value| -> Answer {
        let body = json!({"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0});
        let mut request = server.request(Method::POST, "/v1/chat/completions").json(&body);
        for (name, value) in [("x-session-id", session), ("keepwarm-cold", cold)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        send(request).await
    };
    let user = |text: &str| json!({"role": "user", "content": text});
    let mut messages = json!([user(&"hello there ".repeat(20))]);
    for (session, cold) in [(Some("lossy"), "int4"), (Some("lossy"), ""), (None, "fp8")] {
        let refused = ask(session, Some(cold), &messages).await;
        let told = (refused.status, refused.code(), refused.json()["field"].clone());
        assert_eq!(told, (422, "invalid_field".to_owned(), json!("Keepwarm-Cold")), "{cold}");
    }
    let first = ask(Some("lossy"), Some("fp8"), &messages).await;
    assert_eq!(first.status, 200, "{:?}", first.json());
    let path = format!("/v1/sessions/{}", first.header("keepwarm-session").unwrap());
    let session = server.get(&path).await.json();
    assert_eq!(session["lossy"], true);
    assert_eq!(session["layout"]["parts"][0]["cold"], json!({"dtype": "fp8", "from": "f16"}));
    assert_eq!(
        server.post(&format!("{path}/demote"), &json!({"tier": "pinned"})).await.json()["outcome"],
        "accepted"
    );
    let said = first.json()["choices"][0]["message"]["content"].clone();
    messages.as_array_mut().unwrap().extend([json!({"role": "assistant", "content": said}), user("more")]);
    // What it is, it is for its whole life; a call need not say it.
    let other = ask(Some("lossy"), Some("exact"), &messages).await;
    assert_eq!((other.status, other.code()), (409, "conflict".to_owned()));
    let second = ask(Some("lossy"), None, &messages).await;
    assert_eq!(
        (second.status, second.header("keepwarm-source")),
        (200, Some("pinned")),
        "{:?}",
        second.json()
    );
    let cached = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached >= first.json()["usage"]["prompt_tokens"].as_u64().unwrap(), "{cached} tokens");
    assert_eq!(ask(Some("exact"), None, &json!([user("hello")])).await.status, 200);
    let other = ask(Some("exact"), Some("fp8"), &json!([user("hello"), user("again")])).await;
    assert_eq!((other.status, other.code()), (409, "conflict".to_owned()));
    server.stop().await;
}
