"""What a model can do, and how far one strays from another: perplexity, agreement, chart questions, lm-eval."""
