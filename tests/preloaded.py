"""What workers and clients have imported when they are ready; no module of tests, those register tasks."""

# ruff: noqa: F401

import gc

import alembic.command
import alembic.config
import alembic.runtime.migration
import billiard.heap
import billiard.popen_fork
import billiard.sharedctypes
import billiard.synchronize
import celery.app.control
import celery.app.events
import celery.app.log
import celery.apps.worker
import celery.backends.redis
import celery.bin.celery
import celery.bin.worker
import celery.concurrency.prefork
import celery.concurrency.solo
import celery.concurrency.thread
import celery.fixups.django
import celery.worker.autoscale
import celery.worker.components
import celery.worker.consumer
import celery.worker.consumer.delayed_delivery
import celery.worker.strategy
import kombu.matcher
import kombu.pidbox
import kombu.transport.pyamqp
import kombu.transport.redis
import psycopg
import pytest
import sqlalchemy.dialects.mysql.pymysql
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite.pysqlite
import sqlalchemy.orm

import orchestrator
import orchestrator.cli
import orchestrator.store.migrations.columns

# what is here stays for good: no collection in a fork needs to look at it, and no page of it is copied
gc.collect()
gc.freeze()
