//! What the Volley command-line programs share.
