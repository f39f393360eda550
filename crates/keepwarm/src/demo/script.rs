//! The conversations that the demo plays, and the order of their turns.

use std::fmt;

/// The conversations, as they lie in the repository.
pub(crate) const TEXT: &str = include_str!("../../demo/conversations.txt");

/// What a user says in one conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Conversation {
    pub(crate) title: String,
    /// The messages of the user, one a turn; the first begins with the text that it is about.
    pub(crate) messages: Vec<String>,
}

/// Why the text gave no conversations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ScriptError {
    line: usize,
    reason: &'static str,
}

impl fmt::Display for ScriptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "conversations.txt:{}: {}", self.line, self.reason)
    }
}

#[derive(Default)]
struct Draft {
    title: String,
    text: String,
    questions: Vec<String>,
    line: usize,
}

impl Draft {
    fn finish(self) -> Result<Conversation, ScriptError> {
        let wrong = |reason| ScriptError { line: self.line, reason };
        if self.text.trim().is_empty() {
            return Err(wrong("the conversation has no text"));
        }
        let mut messages = self.questions;
        let first = messages.first_mut().ok_or_else(|| wrong("the conversation has no question"))?;
        *first = format!("{}\n\n{first}", self.text.trim());
        Ok(Conversation { title: self.title, messages })
    }
}

/// Reads the form that the head of the file describes.
pub(crate) fn parse(text: &str) -> Result<Vec<Conversation>, ScriptError> {
    let mut conversations = Vec::new();
    let mut draft: Option<Draft> = None;
    for (index, line) in text.lines().enumerate() {
        let wrong = |reason| ScriptError { line: index + 1, reason };
        if line.starts_with('#') {
            continue;
        }
        if let Some(title) = line.strip_prefix("= ") {
            if let Some(done) = draft.take() {
                conversations.push(done.finish()?);
            }
            draft = Some(Draft { title: title.trim().to_owned(), line: index + 1, ..Draft::default() });
            continue;
        }
        match (&mut draft, line.strip_prefix("? ")) {
            (Some(draft), Some(question)) => draft.questions.push(question.trim().to_owned()),
            (Some(draft), None) if draft.questions.is_empty() => {
                draft.text.push_str(line);
                draft.text.push('\n');
            }
            (_, None) if line.trim().is_empty() => {}
            (Some(_), None) => return Err(wrong("text after the questions: begin a conversation with '= '")),
            (None, _) => return Err(wrong("text before the first conversation: begin one with '= '")),
        }
    }
    conversations.extend(draft.map(Draft::finish).transpose()?);
    Ok(conversations)
}

/// Which conversation speaks when: all open; then they come back two at a time and say two things each; at
/// last each speaks once more, and so on for longer ones. So a conversation is met again both soon, while it
/// is still in a GPU's memory, and late, when it has been driven out.
pub(crate) fn order(conversations: &[Conversation]) -> Vec<usize> {
    let left: Vec<_> = conversations.iter().map(|conversation| conversation.messages.len()).collect();
    let mut order = Vec::new();
    let mut said = vec![0; conversations.len()];
    let mut speak = |conversation: usize| {
        if said[conversation] < left[conversation] {
            said[conversation] += 1;
            order.push(conversation);
        }
    };
    let most = left.iter().copied().max().unwrap_or(0);
    let all = 0..conversations.len();
    all.clone().for_each(&mut speak);
    for pair in all.clone().step_by(2) {
        for _ in 0..2 {
            (pair..(pair + 2).min(conversations.len())).for_each(&mut speak);
        }
    }
    for _ in 0..most {
        all.clone().for_each(&mut speak);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demos_own_conversations_are_many_long_and_several_turns_deep() {
        let conversations = parse(TEXT).unwrap();
        assert!(conversations.len() >= 8);
        for conversation in &conversations {
            assert!(conversation.messages.len() >= 3, "{}", conversation.title);
            let words = conversation.messages[0].split_whitespace().count();
            assert!(words >= 740, "{}: {words} words are too few for 1,000 tokens", conversation.title);
        }
    }

    #[test]
    fn text_goes_in_front_of_the_first_question() {
        let parsed = parse("# note\n\n= One\na\n\nb\n? q1\n? q2\n\n= Two\nc\n? q3\n").unwrap();
        assert_eq!(parsed.len(), 2);
        assert_eq!(
            (parsed[0].title.as_str(), &parsed[0].messages[..]),
            ("One", &["a\n\nb\n\nq1".to_owned(), "q2".to_owned()][..])
        );
        assert_eq!(parsed[1].messages, ["c\n\nq3"]);
    }

    #[test]
    fn what_cannot_be_read_names_its_line() {
        for (text, line) in
            [("x\n", 1), ("= a\n\n? q\n", 1), ("= a\nb\n", 1), ("= a\nb\n? q\nmore\n", 4), ("? q\n", 1)]
        {
            assert_eq!(parse(text).unwrap_err().line, line, "{text:?}");
        }
    }

    #[test]
    fn every_message_is_said_once_and_some_conversations_come_back_soon() {
        let conversations = parse(TEXT).unwrap();
        let order = order(&conversations);
        for (index, conversation) in conversations.iter().enumerate() {
            let turns = order.iter().filter(|speaker| **speaker == index).count();
            assert_eq!(turns, conversation.messages.len());
        }
        assert_eq!(order[..12], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 1]);
    }
}
