//! Archives: export and import of whole sessions.
