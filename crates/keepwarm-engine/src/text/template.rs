//! The chat template: a conversation to tokens, with the place where each message's content ends.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, context};

use super::tokenizer::{Tokenizer, TokenizerError};
use crate::chat::ChatMessage;

/// Stand for a message's content while the template runs; private-use characters that no template writes.
const OPEN: char = '\u{f8f0}';
const CLOSE: char = '\u{f8f1}';
/// Steps that a template may take: a few for each message of a long conversation.
const FUEL: u64 = 2_000_000;

/// A model's chat template.
pub(super) struct Template {
    environment: Environment<'static>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Template")
    }
}

/// A conversation as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// All tokens, up to where the answer begins.
    pub tokens: Vec<u32>,
    /// For each message, the number of tokens up to the end of its content.
    pub ends: Vec<usize>,
}

impl Template {
    pub(super) fn new(source: &str) -> Result<Self, TokenizerError> {
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TokenizerError::Template(error.to_string()))?);
        let added = environment.add_template_owned("chat", source.to_owned());
        added.map_err(|error| TokenizerError::Template(error.to_string()))?;
        Ok(Self { environment })
    }

    fn render(&self, roles: &[&str]) -> Result<String, TokenizerError> {
        let message =
            |(at, role): (usize, &&str)| context! { role => *role, content => format!("{OPEN}{at}{CLOSE}") };
        let messages: Vec<_> = roles.iter().enumerate().map(message).collect();
        let template = self
            .environment
            .get_template("chat")
            .map_err(|error| TokenizerError::Template(error.to_string()))?;
        let rendered = template.render(context! { messages, add_generation_prompt => true });
        rendered.map_err(|error| TokenizerError::Template(error.to_string()))
    }
}

impl Tokenizer {
    /// A conversation's tokens, ready for the answer.
    ///
    /// # Errors
    /// [`TokenizerError::Template`] for a conversation that the template does not take.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<Rendered, TokenizerError> {
        let rendered = self.pieces(messages, 0)?;
        Ok(rendered)
    }

    /// The tokens that follow the content of message `first - 1` (all where `first` is zero), ready for the
    /// answer; `ends` are of the messages from `first` on, counted from there.
    ///
    /// # Errors
    /// [`TokenizerError::Template`].
    pub fn render_after(&self, messages: &[ChatMessage], first: usize) -> Result<Rendered, TokenizerError> {
        self.pieces(messages, first)
    }

    fn pieces(&self, messages: &[ChatMessage], first: usize) -> Result<Rendered, TokenizerError> {
        let roles: Vec<_> = messages.iter().map(|message| message.role.as_str()).collect();
        let text = self.template.render(&roles)?;
        let mut rendered = Rendered { tokens: Vec::new(), ends: Vec::new() };
        let mut rest = text.as_str();
        let mut next = 0;
        while let Some(open) = rest.find(OPEN) {
            let lost =
                || TokenizerError::Template("it does not show every message once, in order".to_owned());
            let close = rest[open..].find(CLOSE).ok_or_else(lost)? + open;
            let at: usize = rest[open + OPEN.len_utf8()..close].parse().map_err(|_| lost())?;
            if at != next {
                return Err(lost());
            }
            // What stands before message `first` belongs to it only from the content of the one before on.
            if at >= first {
                rendered.tokens.extend(self.encode_template(&rest[..open])?);
                rendered.tokens.extend(self.encode(&messages[at].content)?);
                rendered.ends.push(rendered.tokens.len());
            }
            rest = &rest[close + CLOSE.len_utf8()..];
            next += 1;
        }
        if next != messages.len() {
            return Err(TokenizerError::Template("it does not show every message".to_owned()));
        }
        rendered.tokens.extend(self.encode_template(rest)?);
        Ok(rendered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage { role: role.to_owned(), content: content.to_owned() }
    }

    #[test]
    fn a_history_is_a_prefix_of_the_history_with_more() {
        let tokenizer = Tokenizer::bytes();
        let messages = [
            message("system", "be brief"),
            message("user", "hello <|end|>"),
            message("assistant", "hi"),
            message("user", "?"),
        ];
        let whole = tokenizer.render(&messages).unwrap();
        let before = tokenizer.render(&messages[..2]).unwrap();
        assert_eq!(before.tokens[..before.ends[1]], whole.tokens[..whole.ends[1]]);
        let after = tokenizer.render_after(&messages, 3).unwrap();
        assert_eq!(whole.tokens[whole.ends[2]..], after.tokens);
        assert_eq!(after.ends.len(), 1);
        assert_eq!(tokenizer.decode(&after.tokens), "user:?assistant:");
    }
}
