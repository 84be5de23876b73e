"""The demo: two real multi-task models, trained by one method after another."""
