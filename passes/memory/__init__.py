"""Train in less memory: keep less of what autograd saves."""
