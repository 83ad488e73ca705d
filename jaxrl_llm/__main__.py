"""`python -m jaxrl_llm` is `jaxrl`."""

from jaxrl_llm.cli import main

raise SystemExit(main())
