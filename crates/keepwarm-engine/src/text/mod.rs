//! Tokens, the chat template, stop texts.

mod stop;
mod template;
mod tokenizer;

pub use stop::StopMatcher;
pub use template::Rendered;
pub use tokenizer::{TextStream, Tokenizer, TokenizerError};
