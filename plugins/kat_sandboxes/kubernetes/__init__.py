"""The `kubernetes` backend: a pod per sandbox, in any cluster whose API a kubeconfig leads to."""
