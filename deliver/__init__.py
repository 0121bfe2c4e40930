"""What a finished run becomes: answers, scores, comparisons, one merged model."""
