//! The next turn of a 2,000-token chat whose state waits in pinned memory, next to computing it all again.

use std::time::Duration;

use keepwarm_config::{BatchConfig, Config, DeviceKind, GpuConfig, ModelConfig, SingleNode};
use keepwarm_engine::chat::{
    ChatBackend, ChatEvent, ChatMessage, ChatRequest, Finished, Prompt, SessionRef, Started,
};
use keepwarm_engine::serve::Service;
use keepwarm_node::Node;
use keepwarm_types::{Bytes, SessionId, SessionKey, Source, Tier};
use uuid::Uuid;

use crate::{ROUNDS, median};

const MODEL: &str = "smollm2";
/// Repeated until the context has 2,000 tokens: 20 tokens, as this tokenizer counts them.
const SENTENCE: &str =
    "The tide rises twice a day because the moon pulls at the nearer sea more than at the earth. ";
const SENTENCES: usize = 98;
const DEADLINE: Duration = Duration::from_secs(20);

async fn ask(
    service: &Service,
    messages: &[ChatMessage],
    session: Option<SessionId>,
) -> (Started, Finished, String) {
    let request = ChatRequest {
        tenant: "default".parse().unwrap(),
        session: session.map(|id| SessionRef { id, if_match: None, cold: None }),
        model: MODEL.to_owned(),
        prompt: Prompt::Messages(messages.to_vec()),
        max_tokens: Some(1),
        temperature: 0.0,
        top_p: 1.0,
        seed: None,
        stop: Vec::new(),
        idempotency_key: None,
    };
    let mut events = service.chat(request).await.unwrap();
    let (mut started, mut text) = (None, String::new());
    loop {
        match events.recv().await.unwrap() {
            ChatEvent::Started(begun) => started = Some(begun),
            ChatEvent::Text(piece) => text.push_str(&piece),
            ChatEvent::Finished(finished) => return (started.unwrap(), finished, text),
            ChatEvent::Failed(error) => panic!("{error}"),
        }
    }
}

async fn measure(path: &std::path::Path) {
    let model = ModelConfig {
        name: MODEL.to_owned(),
        source: format!("gguf:{}", path.display()),
        instances: (1, 1),
        batch: BatchConfig::default(),
    };
    let config = Config::single(SingleNode {
        name: "n1".parse().unwrap(),
        http: "127.0.0.1:0".to_owned(),
        gpus: vec![GpuConfig { device: DeviceKind::Host, memory: Bytes(256 << 20) }],
        pinned: Bytes(512 << 20),
        data_dir: None,
        models: vec![model.clone()],
    });
    let node = Node::start(config, &"n1".parse().unwrap()).await.unwrap();
    let handle = node.handle();
    let service = Service::start(&handle, &[model]).unwrap();
    let id = SessionId::new(Uuid::from_u128(0x4000_8000_0000_0000_0001)).unwrap();
    let key = SessionKey::new("default".parse().unwrap(), id);
    let message =
        |role: &str, content: &str| ChatMessage { role: role.to_owned(), content: content.to_owned() };
    let mut history = vec![message("user", &SENTENCE.repeat(SENTENCES))];
    let (_, _, text) = ask(&service, &history, Some(id)).await;
    history.push(message("assistant", &text));
    let (mut resumed, mut recomputed, mut prompt, mut fresh) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..ROUNDS {
        history.push(message("user", "Why?"));
        handle.settled(&key).await.unwrap();
        handle.demote(&key, Tier::Pinned).await.unwrap();
        let (started, kept, text) = ask(&service, &history, Some(id)).await;
        assert_eq!(started.source, Source::Pinned);
        (prompt, fresh) = (started.prompt_tokens, started.prompt_tokens - started.cached_tokens);
        let (_, again, same) = ask(&service, &history, None).await;
        assert_eq!(text, same, "the state that came back gives another token");
        resumed.push(kept.ttft.as_secs_f64());
        recomputed.push(again.ttft.as_secs_f64());
        history.push(message("assistant", &text));
    }
    let ratio = median(recomputed.iter().zip(&resumed).map(|(again, kept)| again / kept).collect());
    println!(
        "chat of {prompt} tokens, {fresh} of them new: first token {:.0} ms from pinned memory, {:.0} ms recomputed, ratio {ratio:.0}",
        median(resumed) * 1e3,
        median(recomputed) * 1e3
    );
    drop(service);
    node.shutdown(DEADLINE).await;
}

pub(crate) fn run() {
    let Some(path) = keepwarm_engine::weights::cached() else {
        println!("skipped: there are no weights (keepwarm model fetch)");
        return;
    };
    tokio::runtime::Runtime::new().unwrap().block_on(measure(&path));
}
