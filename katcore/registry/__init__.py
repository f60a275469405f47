"""The one home of mlflow: runs, metrics, registered models."""
