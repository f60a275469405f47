"""Airflow and MLflow on one machine: start them, watch them, drive a run through them, leave nothing.

A supervisor process of our own starts the services, each in a process group of its own. All of their state is
under katcore's home; all of their ports are on loopback. Production runs them some other way; see
`docs/how-to/airflow.md`.
"""
