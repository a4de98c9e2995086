"""The loop: stages in their order, started, resumed and measured."""
