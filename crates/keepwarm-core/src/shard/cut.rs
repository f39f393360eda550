//! Cutting parts short: for truncation, forks, turns that replace what was said, and windows.
//!
//! A block's checksum is over all its bytes, so a cut inside a block keeps whole blocks only.

use keepwarm_types::{Bytes, Tokens};

use crate::session::{Form, Manifest, PartState, State};

/// Cuts all token-counted parts to the longest common whole-block length of at most `tokens`, and drops
/// snapshots, which are of the full length alone. Returns the length that remained.
pub(super) fn cut_to_tokens(manifest: &mut Manifest, tokens: Tokens) -> Tokens {
    if tokens >= manifest.length_tokens {
        return manifest.length_tokens;
    }
    if let State::Cold(_) = manifest.state {
        set_cold_length(manifest, tokens);
        return tokens;
    }
    let kept = whole_length(manifest, tokens);
    let forms: Vec<_> = manifest.layout.parts().iter().map(|part| part.form).collect();
    for (state, form) in manifest.parts.iter_mut().zip(forms) {
        match form {
            Form::Paged(planes) | Form::Window { planes, .. } => {
                cut_part(state, form.block_bytes(), Bytes(kept.0 * planes.token_bytes()));
            }
            Form::Snapshot { .. } => *state = PartState::default(),
            Form::Bytes { .. } => {}
        }
    }
    manifest.length_tokens = kept;
    kept
}

/// The longest length of at most `tokens` that ends a block in every part and that every part still has.
fn whole_length(manifest: &Manifest, tokens: Tokens) -> Tokens {
    let parts = manifest.layout.parts();
    if parts.iter().any(|part| matches!(part.form, Form::Snapshot { .. })) {
        return Tokens::ZERO;
    }
    let mut kept = tokens.0;
    loop {
        let before = kept;
        for planes in parts.iter().filter_map(|part| part.form.planes()) {
            kept -= kept % u64::from(planes.tokens_per_block);
        }
        if kept == before {
            break;
        }
    }
    let windows_hold = parts.iter().zip(&manifest.parts).all(|(part, state)| match part.form {
        Form::Window { planes, window_tokens } => {
            let needed_from = kept.saturating_sub(window_tokens.into());
            u64::from(state.first_block) * u64::from(planes.tokens_per_block) <= needed_from
        }
        _ => true,
    });
    if windows_hold { Tokens(kept) } else { Tokens::ZERO }
}

/// Cuts a `bytes` part to whole blocks of at most `length`. Returns what remained.
pub(super) fn cut_to_bytes(state: &mut PartState, block_bytes: u64, length: Bytes) -> Bytes {
    if length < state.length {
        cut_part(state, block_bytes, Bytes(length.0 - length.0 % block_bytes));
    }
    state.length
}

fn cut_part(state: &mut PartState, block_bytes: u64, length: Bytes) {
    let whole = usize::try_from(length.0 / block_bytes).expect("keepwarm runs on 64-bit targets");
    let first = state.first_block as usize;
    if whole <= first {
        *state = PartState::default();
        return;
    }
    state.blocks.truncate(whole - first);
    state.length = length;
    state.digest = None;
}

/// Drops blocks that no longer lie in their part's window.
pub(super) fn fall_out_of_window(manifest: &mut Manifest) {
    let forms: Vec<_> = manifest.layout.parts().iter().map(|part| part.form).collect();
    for (state, form) in manifest.parts.iter_mut().zip(forms) {
        let Form::Window { planes, window_tokens } = form else { continue };
        let tokens = state.length.0 / planes.token_bytes();
        let needed = tokens.saturating_sub(window_tokens.into()) / u64::from(planes.tokens_per_block);
        let needed = u32::try_from(needed).unwrap_or(u32::MAX).max(state.first_block);
        let gone = ((needed - state.first_block) as usize).min(state.blocks.len());
        state.blocks.drain(..gone);
        state.first_block += u32::try_from(gone).unwrap_or(u32::MAX);
        if gone > 0 {
            state.digest = None;
        }
    }
}

fn set_cold_length(manifest: &mut Manifest, tokens: Tokens) {
    let forms: Vec<_> = manifest.layout.parts().iter().map(|part| part.form).collect();
    for (state, form) in manifest.parts.iter_mut().zip(forms) {
        if let Some(length) = form.bytes_of(tokens) {
            state.length = length;
        }
    }
    manifest.length_tokens = tokens;
}
