"""`python -m jaxrl_llm` is `jaxrl`."""

from jaxrl_llm.launch import main

raise SystemExit(main())
