//! Typed HTTP client for keepwarm.
