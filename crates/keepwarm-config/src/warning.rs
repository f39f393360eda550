//! What a valid file still lets go wrong: `keepwarm check` says it, nothing refuses it.

use crate::config::Config;

impl Config {
    /// What this configuration cannot do, though it is valid; each says what would help.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.is_cluster() {
            return warnings;
        }
        let voters: Vec<_> = self.voters().collect();
        if self.nodes.len() == 2 {
            warnings.push(
                "two nodes cannot take over from each other: a node that hears nothing cannot tell whether its \
                 peer died or the link did. Add a third [[node]] that only votes (voter = true, pinned = \"0B\", \
                 no [[node.gpu]]) and let all three vote"
                    .to_owned(),
            );
        } else if let [only] = &voters[..] {
            warnings.push(format!(
                "{} is the only voter: while it is down, no other node takes over; let three nodes vote",
                only.name
            ));
        }
        for voter in voters.iter().filter(|voter| voter.data_dir.is_none()) {
            warnings.push(format!(
                "{} votes without a data_dir: after each restart it may not vote until the others have let it \
                 in again; give it a data_dir",
                voter.name
            ));
        }
        if self.write_deadline <= self.suspect_after {
            warnings.push(format!(
                "write_deadline_ms = {} is not above suspect_after_ms = {}: a write to a node that died ends as \
                 outcome_unknown before that node is even suspected",
                self.write_deadline.as_millis(),
                self.suspect_after.as_millis()
            ));
        }
        warnings
    }
}
