"""What each chapter computes from records, stores and models: frames in, frames out, one module a chapter."""
